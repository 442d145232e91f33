/** For `node --import`: tells the parent process, whenever it sends a message, by how much timers were late since the last one. */
import { isMainThread } from "node:worker_threads";

if (isMainThread && process.send) {
  const EVERY_MS = 1;
  let late = [];
  let last = performance.now();
  setInterval(() => {
    const now = performance.now();
    late.push(now - last - EVERY_MS);
    last = now;
  }, EVERY_MS).unref();
  process.on("message", () => {
    late.sort((a, b) => a - b);
    process.send({ p99: late[Math.floor(0.99 * (late.length - 1))], max: late.at(-1) });
    late = [];
  });
  process.channel.unref();
}
