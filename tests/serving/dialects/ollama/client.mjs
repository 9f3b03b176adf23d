// What people do with the npm package "ollama", unchanged. Prints what came back, as JSON.
import { Ollama } from "ollama";

const client = new Ollama({ host: process.argv[2] });
const picture = Uint8Array.from(Buffer.from(process.argv[3], "base64"));
const messages = [{ role: "user", content: "What is it?", images: [picture] }];
const schema = { type: "object", properties: { shape: { type: "string" } } };

const collect = async (stream) => {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return pieces;
};
const refused = async (call) => {
  try {
    await call();
  } catch (error) {
    return { message: error.message, status: error.status_code };
  }
};

const found = {};
found.version = await client.version();
found.tags = await client.list();
found.chat = await client.chat({ model: "talk", messages, format: schema, options: { temperature: 0.5, seed: 3 } });
found.stream = await collect(await client.chat({ model: "talk:latest", messages, stream: true, keep_alive: "5m" }));
found.generate = await client.generate({ model: "talk", prompt: "What is it?", images: [picture], system: "Be short." });
found.drawn = await collect(await client.generate({ model: "draw", prompt: "a circle", steps: 2, stream: true }));
found.loaded = await client.generate({ model: "talk", prompt: "" });
found.ps = await client.ps();
found.show = await client.show({ model: "talk" });
found.pulled = await collect(await client.pull({ model: "shapes:1", stream: true }));
found.pulledAgain = await client.pull({ model: "shapes:1" });
found.copied = await client.copy({ source: "shapes:1", destination: "mine" });
found.created = await client.create({ model: "made", from: "good" });
found.deleted = await client.delete({ model: "mine" });
found.left = (await client.list()).models.map((model) => model.name);
found.unknown = await refused(() => client.chat({ model: "tolk", messages }));
found.tools = await refused(() => client.chat({ model: "talk", messages, tools: [{ type: "function" }] }));
found.embed = await refused(() => client.embed({ model: "talk", input: ["x"] }));

const endless = await client.chat({ model: "talk", messages, stream: true });
for await (const piece of endless) {
  found.before = piece.message.content;
  break;
}
client.abort();
console.log(JSON.stringify(found));
