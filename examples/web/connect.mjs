// Calls a server from a web page, or from Node 18 and newer, with nothing but fetch().

/** The response of a method that has one, as an object. Throws an Error with the server's message. */
export async function call(server, method, message) {
  const response = await fetch(`${server}/enginecast.v1.${method}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(message),
  });
  const found = await response.json();
  if (!response.ok) throw new Error(`${found.code}: ${found.message}`);
  return found;
}

/** The responses of a method that streams them, each as an object when it arrives. Leaving the loop cancels the request. */
export async function* stream(server, method, message) {
  const leaving = new AbortController();
  const response = await fetch(`${server}/enginecast.v1.${method}`, {
    method: "POST",
    headers: { "Content-Type": "application/connect+json" },
    body: envelope(new TextEncoder().encode(JSON.stringify(message))),
    signal: leaving.signal,
  });
  if (!response.ok) throw new Error(`HTTP ${response.status}: ${await response.text()}`);
  let waiting = new Uint8Array();
  try {
    for await (const piece of pieces(response.body)) {
      waiting = joined(waiting, piece);
      for (let size; waiting.length >= 5 && waiting.length >= 5 + (size = sizeOf(waiting)); ) {
        const content = JSON.parse(new TextDecoder().decode(waiting.subarray(5, 5 + size)));
        if (waiting[0] & END) {
          if (content.error) throw new Error(`${content.error.code}: ${content.error.message}`);
          return;
        }
        yield content;
        waiting = waiting.slice(5 + size);
      }
    }
  } finally {
    leaving.abort();
  }
}

const END = 2; // the flag of a stream's last message

/** A message of a stream: a byte of flags, four bytes of its size, its content. */
function envelope(content) {
  const framed = new Uint8Array(5 + content.length);
  new DataView(framed.buffer).setUint32(1, content.length);
  framed.set(content, 5);
  return framed;
}

function sizeOf(framed) {
  return new DataView(framed.buffer, framed.byteOffset).getUint32(1);
}

function joined(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

async function* pieces(body) {
  const reader = body.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
}
