// A server in JavaScript (StarlingMonkey, wasi:http 0.2): a guest that no Rust made.
//
//     /  /hello           "hello"                 /echo        the body back, as it comes
//     /json?items         builds, writes and reads a document; the answer is that of web.wasm to the same path
//     else 404
addEventListener('fetch', (event) => event.respondWith(answer(event.request)));

function answer(request) {
  const url = new URL(request.url);
  switch (url.pathname) {
    case '/':
    case '/hello':
      return text(200, 'hello\n');
    case '/echo':
      return new Response(request.body, { headers: { 'content-type': 'application/octet-stream' } });
    case '/json':
      return text(200, prices(Number(url.searchParams.get('items') ?? 100)));
    default:
      return text(404, 'not found\n');
  }
}

function text(status, body) {
  return new Response(body, { status, headers: { 'content-type': 'text/plain' } });
}

// ITEMS BYTES SUM: how long the document was, and the sum of its prices as read back from it.
function prices(items) {
  const document = Array.from({ length: items }, (_, item) => (
    { id: item, name: `item ${item}`, price: item * 3, tags: ['a', 'b', 'c'] }
  ));
  const written = JSON.stringify({ items: document });
  const total = JSON.parse(written).items.reduce((sum, item) => sum + item.price, 0);
  return `${items} ${written.length} ${total}\n`;
}
