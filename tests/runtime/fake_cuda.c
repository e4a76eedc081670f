/* A driver whose GPU is this machine's memory: what cudadriver.py calls, with the types of cuda.h. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;

int fake_init = 0, fake_version = 13000, fake_room = 1 << 30, fake_live = 0, fake_streams = 0, fake_contexts = 0;

CUresult cuInit(unsigned flags) { return fake_init; }
CUresult cuDriverGetVersion(int *version) { *version = fake_version; return 0; }
CUresult cuDeviceGet(int *device, int number) { *device = 7; return 0; }
CUresult cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Fake RTX 4060", length); return device != 7; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? 8 : 9;
  return device != 7;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = &fake_init; fake_contexts++; return device != 7; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { fake_contexts--; return device != 7; }
CUresult cuCtxSetCurrent(void *context) { return context != &fake_init; }
CUresult cuStreamCreate(void **stream, unsigned flags) { *stream = &fake_version; fake_streams++; return flags != 1; }
CUresult cuStreamDestroy_v2(void *stream) { fake_streams--; return stream != &fake_version; }
CUresult cuStreamSynchronize(void *stream) { return stream != &fake_version; }
CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
  if (size > (size_t)fake_room) return 2;
  *pointer = (CUdeviceptr)(uintptr_t)malloc(size);
  fake_live++;
  return 0;
}
CUresult cuMemFree_v2(CUdeviceptr pointer) { free((void *)(uintptr_t)pointer); fake_live--; return 0; }
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) { *available = fake_room; *total = 1 << 30; return 0; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream) {
  memcpy((void *)(uintptr_t)to, from, size);
  return stream != &fake_version;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream) {
  memcpy(to, (const void *)(uintptr_t)from, size);
  return stream != &fake_version;
}
CUresult cuGetErrorName(CUresult code, const char **text) {
  *text = code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : NULL;
  return *text == NULL;
}
