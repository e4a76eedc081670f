"""The operators a graph of atenfile.py may hold: PyTorch's own, without effect beyond their result.

Left out on purpose: what reads files (aten.from_file), reads memory by strides of the file's own (as_strided), leaves
memory as it was (empty), draws random numbers, changes its inputs, or loops. A test holds each line to torch's schemas.
"""

from __future__ import annotations

__all__ = ["ITEM", "OPERATORS"]

ITEM = "item"
"""Of the tuple or list that a node gives: args [value, number]."""

_TABLE = """
abs acos add.Tensor add.Scalar addcdiv addcmul addmm all all.dim all.dims amax amin any any.dim any.dims arange
arange.start arange.start_step argmax argmin asin atan atan2 avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d baddbmm bitwise_and.Tensor bitwise_and.Scalar bitwise_not bitwise_or.Tensor
bitwise_or.Scalar bmm broadcast_to bucketize.Tensor cat ceil celu chunk clamp clamp.Tensor clamp_max clamp_min clone
concat constant_pad_nd contiguous conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_transpose1d
conv_transpose2d.input conv_transpose3d.input convolution cos cosh cumprod cumsum div.Tensor div.Scalar
div.Tensor_mode div.Scalar_mode dropout einsum elu embedding eq.Tensor eq.Scalar erf erfc exp exp2 expand expand_as
expm1 fill.Scalar flatten.using_ints flip floor floor_divide fmod.Tensor fmod.Scalar full full_like gather ge.Tensor
ge.Scalar gelu glu group_norm gt.Tensor gt.Scalar hardsigmoid hardswish hardtanh hstack hypot index.Tensor
index_select instance_norm isfinite isinf isnan layer_norm le.Tensor le.Scalar leaky_relu lerp.Scalar lerp.Tensor
linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax.int logical_and logical_not logical_or
logical_xor logsumexp lt.Tensor lt.Scalar masked_fill.Scalar masked_fill.Tensor matmul max max.dim max.other
max_pool1d max_pool2d max_pool3d maximum mean mean.dim meshgrid meshgrid.indexing min min.dim min.other minimum mish
mm movedim.int movedim.intlist mul.Tensor mul.Scalar multiply.Tensor nan_to_num narrow native_group_norm
native_layer_norm ne.Tensor ne.Scalar neg new_full new_ones new_zeros norm.Scalar norm.ScalarOpt_dim one_hot ones
ones_like outer pad permute pixel_shuffle pixel_unshuffle pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar prelu prod
prod.dim_int reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder.Tensor remainder.Scalar repeat
repeat_interleave.self_int replication_pad1d replication_pad2d replication_pad3d reshape rms_norm roll round rsqrt
rsub.Tensor rsub.Scalar scalar_tensor scaled_dot_product_attention scatter.src scatter.value select.int selu sgn
sigmoid sign silu sin sinh slice.Tensor softmax.int softplus sort split split.Tensor split.sizes split_with_sizes sqrt
square squeeze squeeze.dim squeeze.dims stack std.dim std.correction sub.Tensor sub.Scalar sum sum.dim_IntList
swapaxes t tan tanh tensor_split.sections tile topk transpose.int tril triu true_divide.Tensor trunc unbind.int
unflatten.int unfold unsqueeze upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d upsample_bilinear2d.vec
upsample_linear1d upsample_linear1d.vec upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d
upsample_nearest2d.vec upsample_nearest3d upsample_nearest3d.vec upsample_trilinear3d.vec var.dim var.correction
var_mean.correction view view_as vstack where.self where.ScalarOther where.ScalarSelf zeros zeros_like _softmax
_to_copy _unsafe_view
"""

OPERATORS = frozenset(
    {ITEM, *(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in _TABLE.split())}
)
"""aten.NAME.OVERLOAD as torch.ops has them, and ITEM."""
