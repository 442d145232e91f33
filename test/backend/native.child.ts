/** Run by native.test.ts in a separate process with a single file thread; prints the order in which things finish. */
import { execFileSync } from "node:child_process";
import { closeSync, openSync } from "node:fs";
import { open, stat } from "node:fs/promises";
import { join } from "node:path";
import { isMainThread, parentPort, Worker } from "node:worker_threads";
import type { Program } from "../../src/backend/backend.ts";
import { nativeBackend } from "../../src/backend/native.ts";
import { Graph } from "../../src/graph/graph.ts";

const [what, folder] = process.argv.slice(2);

/** A program and its arrays: a chain of `n` products with a matrix of `size` rows. */
async function product(n: number, size: number): Promise<() => Promise<void>> {
  const backend = nativeBackend({ threads: 2 });
  const g = new Graph();
  const state = g.state("w", [size, size], "f32");
  let y = g.input("x", [size, size], "f32");
  for (let i = 0; i < n; i++) y = g.linear(y, state);
  g.output("y", y);
  const program: Program = backend.prepare(g, {}, await backend.load([]), new Map([["w", backend.state("f32", [size, size])]]));
  const [x, out] = [new Float32Array(size * size), new Float32Array(size * size)];
  return () => program.run({}, { x }, { y: out });
}

const events: string[] = [];
const note = (event: string) => () => {
  events.push(event);
};

switch (what) {
  // Opening a pipe blocks the only file thread until the other end is opened.
  case "blocked": {
    const step = await product(2, 16);
    const pipe = join(folder, "pipe");
    execFileSync("mkfifo", [pipe]);
    const reader = open(pipe, "r").then((file) => {
      note("file")();
      return file.close();
    });
    for (let i = 0; i < 3; i++) await step().then(note("step"));
    closeSync(openSync(pipe, "w"));
    await reader;
    break;
  }
  // Steps that take far longer than a file's stat.
  case "busy": {
    const step = await product(4, 1024);
    const steps = Promise.all([0, 1, 2].map(() => step().then(note("step"))));
    await stat(folder).then(note("file"));
    await steps;
    break;
  }
  // Nothing is pending and nothing was disposed of: the process exits by itself.
  case "idle": {
    const step = await product(1, 16);
    await step();
    note("step")();
    break;
  }
  // Nothing awaits this promise, but its arrays are in use.
  case "pending": {
    const step = await product(4, 512);
    void step().then(() => console.log("step"));
    break;
  }
  case "exit": {
    const step = await product(4, 1024);
    void step();
    void step();
    note("exit")();
    console.log(events.join());
    process.exit(0);
    break;
  }
  // Environments that end in the middle of a step that uses their arrays.
  case "workers": {
    if (isMainThread) {
      for (let i = 0; i < 3; i++) {
        const source = `import("tsx/esm/api").then(({ register }) => (register(), import(${JSON.stringify(import.meta.url)})));`;
        const worker = new Worker(source, { eval: true, argv: process.argv.slice(2) });
        await new Promise((resolve) => worker.once("message", resolve));
        await worker.terminate();
        note("ended")();
      }
      const step = await product(1, 16);
      await step().then(note("step"));
    } else {
      const step = await product(4, 512);
      await step();
      void step();
      void step();
      parentPort?.postMessage("stepping");
      await new Promise((resolve) => setTimeout(resolve, 60_000));
    }
    break;
  }
  default:
    throw new Error(`nothing is called ${what}`);
}
if (isMainThread && events.length > 0) console.log(events.join());
