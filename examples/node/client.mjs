// Draws a picture, writes it, asks a question about it: both streams of enginecast.v1 from Node.
//
//   node client.mjs --address 127.0.0.1:50051 --draw shapes-diffusion --ask shapes-vlm \
//     --prompt "a large red circle at the top left on a white background" --question "what color is the circle?" --out picture.png

import { rename, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

// Found from the folder in which the program is run, so that its packages may be installed anywhere.
const require = createRequire(path.join(process.cwd(), 'package.json'));
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const protos = path.join(path.dirname(fileURLToPath(import.meta.url)), '..', '..', 'proto');

const { values: options } = parseArgs({
  options: {
    address: { type: 'string', default: '127.0.0.1:50051' },
    draw: { type: 'string', default: 'shapes-diffusion' },
    ask: { type: 'string', default: 'shapes-vlm' },
    prompt: { type: 'string', default: 'a large red circle at the top left on a white background' },
    question: { type: 'string', default: 'what color is the circle?' },
    steps: { type: 'string' },
    out: { type: 'string', default: 'picture.png' },
  },
});

function services() {
  const files = ['image', 'chat'].map((name) => `enginecast/v1/${name}.proto`);
  // longs: a seed may exceed what a JavaScript number holds exactly.
  const definition = protoLoader.loadSync(files, { includeDirs: [protos], longs: String, enums: String, defaults: true, oneofs: true });
  const { ImageService, ChatService } = grpc.loadPackageDefinition(definition).enginecast.v1;
  const limits = { 'grpc.max_receive_message_length': 64 << 20, 'grpc.max_send_message_length': 64 << 20 };
  return [ImageService, ChatService].map((Service) => new Service(options.address, grpc.credentials.createInsecure(), limits));
}

// A stream can be iterated; its call ends in an exception when the status is not OK.
async function draw(images) {
  const request = { model: options.draw, prompt: options.prompt, ...(options.steps && { steps: Number(options.steps) }) };
  let png;
  for await (const response of images.Generate(request)) {
    if (response.event === 'progress') {
      console.error(`step ${response.progress.step} of ${response.progress.total}, ${response.progress.etaSeconds.toFixed(1)} s left`);
    } else if (response.event === 'image') {
      png = response.image.png;
      console.error(`${response.image.width}x${response.image.height}, seed ${response.image.seed}`);
    }
  }
  await writeFile(`${options.out}.part`, png);
  await rename(`${options.out}.part`, options.out);
  console.log(options.out);
  return png;
}

async function ask(chats, png) {
  const parts = [{ image: png }, { text: options.question }];
  for await (const response of chats.Chat({ model: options.ask, messages: [{ role: 'ROLE_USER', parts }] })) {
    if (response.event === 'delta') process.stdout.write(response.delta.text);
    if (response.event === 'done') process.stdout.write('\n');
  }
}

const [images, chats] = services();
try {
  await ask(chats, await draw(images));
} catch (error) {
  if (error.code === undefined) throw error;
  console.error(`${grpc.status[error.code] ?? error.code}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  images.close();
  chats.close();
}
