/** node:fs for a page: the files lie on the server the page came from. */

export function readFileSync(url: URL): Uint8Array {
  const request = new XMLHttpRequest();
  request.open("GET", url, false);
  request.send();
  if (request.status !== 200) throw new Error(`${url.href} answers ${request.status}`);
  return new TextEncoder().encode(request.responseText);
}
