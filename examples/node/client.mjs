// Draws a picture, writes it, asks a question about it: both streams of enginecast.v1 from Node.
//
//   node client.mjs --help
//   node client.mjs --address 127.0.0.1:50051 --draw shapes-diffusion --ask shapes-vlm \
//     --prompt "a large red circle at the top left on a white background" --question "what color is the circle?" --out picture.png

import { readFile, rename, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const OPTIONS = {
  address: ['127.0.0.1:50051', 'server, HOST:PORT'],
  draw: ['shapes-diffusion', 'name of the model that draws'],
  ask: ['shapes-vlm', 'name of the model that is asked'],
  prompt: ['a large red circle at the top left on a white background', 'what to draw'],
  question: ['what color is the circle?', 'what to ask about the picture'],
  steps: ['', 'denoising steps; without it, as many as the model usually takes'],
  out: ['picture.png', 'PNG file to write'],
  ca: ['', "PEM file of the server's certificate authority; switches TLS on"],
  token: ['', 'bearer token, sent with TLS only; better in the variable ENGINECAST_TOKEN'],
};

function usage() {
  const lines = Object.entries(OPTIONS).map(([name, [value, text]]) => `  --${name.padEnd(9)} ${text}${value && ` (default: ${value})`}`);
  return ['node client.mjs [OPTIONS]', 'Draws a picture and asks a question about it.', '', ...lines, '  --help      show this'].join('\n');
}

function stop(message, code) {
  console.error(`client.mjs: ${message}`);
  process.exit(code);
}

function readOptions() {
  const known = Object.entries(OPTIONS).map(([name, [value]]) => [name, { type: 'string', default: value }]);
  let values;
  try {
    ({ values } = parseArgs({ options: { ...Object.fromEntries(known), help: { type: 'boolean', default: false } } }));
  } catch (error) {
    stop(`${error.message.split('. ')[0]}: --help lists the options`, 2);
  }
  if (values.help) {
    console.log(usage());
    process.exit(0);
  }
  if (values.steps && !/^[1-9]\d{0,8}$/.test(values.steps)) stop(`--steps is '${values.steps}', expected a number of 1 or more`, 2);
  return values;
}

const options = readOptions();

// Found from the folder in which the program is run, so that its packages may be installed anywhere.
const require = createRequire(path.join(process.cwd(), 'package.json'));

function needed(name) {
  try {
    return require(name);
  } catch (error) {
    return stop(`cannot load ${name} (${error.code}): run \`npm install\` in this folder`, 1);
  }
}

const grpc = needed('@grpc/grpc-js');
const protoLoader = needed('@grpc/proto-loader');
const protos = path.join(path.dirname(fileURLToPath(import.meta.url)), '..', '..', 'proto');

async function credentials() {
  const token = options.token || process.env.ENGINECAST_TOKEN;
  if (!options.ca) return token ? stop('a token is sent with TLS only: name the authority with --ca', 2) : grpc.credentials.createInsecure();
  const tls = grpc.credentials.createSsl(await readFile(options.ca).catch((error) => stop(`--ca cannot be read: ${error.message}`, 2)));
  if (!token) return tls;
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${token}`);
  return grpc.credentials.combineChannelCredentials(tls, grpc.credentials.createFromMetadataGenerator((_, done) => done(null, metadata)));
}

async function services() {
  const files = ['image', 'chat'].map((name) => `enginecast/v1/${name}.proto`);
  // longs: a seed may exceed what a JavaScript number holds exactly.
  const definition = protoLoader.loadSync(files, { includeDirs: [protos], longs: String, enums: String, defaults: true, oneofs: true });
  const { ImageService, ChatService } = grpc.loadPackageDefinition(definition).enginecast.v1;
  const limits = { 'grpc.max_receive_message_length': 64 << 20, 'grpc.max_send_message_length': 64 << 20 };
  const allowed = await credentials();
  return [ImageService, ChatService].map((Service) => new Service(options.address, allowed, limits));
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
  let begun = false;
  for await (const response of chats.Chat({ model: options.ask, messages: [{ role: 'ROLE_USER', parts }] })) {
    if (response.event === 'delta') {
      process.stdout.write(begun ? response.delta.text : response.delta.text.trimStart()); // answers of many models begin with a blank
      begun ||= response.delta.text.trim() !== '';
    }
    if (response.event === 'done') process.stdout.write('\n');
  }
}

const [images, chats] = await services();
try {
  await ask(chats, await draw(images));
} catch (error) {
  console.error(`client.mjs: ${grpc.status[error.code] ?? error.code ?? error.name}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  images.close();
  chats.close();
}
