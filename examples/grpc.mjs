// A conversation over gRPC, with the experts of each token and error handling. Run: node examples/grpc.mjs
// This example starts its own server; to start one yourself, run `npx mixtape serve --grpc-port 50051`.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { credentials, loadPackageDefinition, Metadata, status } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const binary = fileURLToPath(new URL("../bin/mixtape.js", import.meta.url));
const server = spawn(process.execPath, [binary, "serve", "--port", "0", "--grpc-port", "0"], { stdio: ["ignore", "ignore", "pipe"] });
let port;
for await (const line of createInterface({ input: server.stderr })) if ((port = /gRPC on port (\d+)/.exec(line)?.[1])) break;

const proto = fileURLToPath(import.meta.resolve("mixtape/proto/mixtape/v1/mixtape.proto"));
const { mixtape } = loadPackageDefinition(loadSync(proto, { keepCase: true, longs: Number, enums: String, oneofs: true }));
const client = new mixtape.v1.Mixtape(`127.0.0.1:${port}`, credentials.createInsecure());

const metadata = new Metadata();
metadata.set("authorization", `Bearer ${process.env.MIXTAPE_KEY ?? "none"}`); // if the server has keys
const request = {
  model: "default",
  messages: [{ role: "ROLE_USER", content: "What is the capital of Japan?" }],
  options: { sampling: { temperature: 0 }, max_tokens: 40, routing: true },
};
let last;
for await (const event of client.Chat(request, metadata, { deadline: Date.now() + 30_000 })) {
  if (event.text) process.stdout.write(event.text.text);
  if (event.routing) last = event.routing;
  if (event.end) console.log(`\n${event.end.usage.completion_tokens} tokens, ${event.end.reason}`);
}
const { layer, experts } = last.layers[0];
console.log(`the last token used experts ${experts.join(", ")} of layer ${layer}`);

try {
  for await (const _ of client.Chat({ ...request, options: { sampling: { top_p: 2 } } }, metadata));
} catch (error) {
  console.log(`${status[error.code]} of ${error.metadata.get("mixtape-field")[0]}`);
}
client.close();
server.kill("SIGTERM");
await once(server, "exit");
