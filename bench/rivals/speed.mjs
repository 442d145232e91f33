/**
 * Speed beside another engine, llama.cpp through node-llama-cpp: the same weights, the same threads, alternating in one run.
 * Prints medians and ratios. The GGUF file holds the same weights as the folder (mixtape export).
 *
 *   npm run build && npm install --no-package-lock --prefix bench/rivals && node bench/rivals/speed.mjs MODEL MODEL.gguf [--prompts 128,512] [--new-tokens 24] [--rounds 3] [--threads 2]
 */
import { parseArgs } from "node:util";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";
import { GREEDY } from "../../dist/engine/sampling.js";
import { AutoModelForCausalLM } from "../../dist/index.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    prompts: { type: "string", default: "128,512" },
    "new-tokens": { type: "string", default: "24" },
    rounds: { type: "string", default: "3" },
    threads: { type: "string", default: "2" },
  },
});
const [folder, gguf] = positionals;
if (!folder || !gguf) throw new Error("usage: speed.mjs MODEL MODEL.gguf");
const threads = Number(values.threads);
const newTokens = Number(values["new-tokens"]);
const lengths = values.prompts.split(",").map(Number);

const ours = await AutoModelForCausalLM.from_pretrained(folder, { threads });
const llama = await getLlama({ gpu: false, logLevel: LlamaLogLevel.error, maxThreads: threads });
const theirs = await llama.loadModel({ modelPath: gguf, gpuLayers: 0 });
const contextSize = Math.max(...lengths) + newTokens + 64;
const context = await theirs.createContext({ contextSize, batchSize: 512, threads });

const engines = {
  mixtape: (ids) => ours.engine.submit({ tokens: ids, sampling: GREEDY, maxNewTokens: newTokens + 1 }),
  "node-llama-cpp": async function* (ids) {
    const sequence = context.getSequence();
    try {
      let made = 0;
      for await (const token of sequence.evaluate(ids, { temperature: 0 })) {
        yield token;
        if (++made > newTokens) break;
      }
    } finally {
      sequence.dispose();
    }
  },
};

/** Prompt tokens a second, and milliseconds a new token (the median). */
async function measure(engine, ids) {
  const start = performance.now();
  const times = [];
  for await (const _ of engine(ids)) times.push(performance.now());
  const gaps = times.slice(1).map((t, i) => t - times[i]);
  return { prompt: (ids.length / (times[0] - start)) * 1000, token: median(gaps) };
}

function median(list) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

const vocabulary = ours.config.vocabSize;
for (const n of lengths) {
  const ids = Array.from({ length: n }, (_, i) => 20 + ((i * 7919) % (vocabulary - 20)));
  const results = { mixtape: [], "node-llama-cpp": [] };
  for (let round = -1; round < Number(values.rounds); round++)
    for (const [name, engine] of Object.entries(engines)) {
      const result = await measure(engine, ids);
      if (round >= 0) results[name].push(result); // the first one warms up
    }
  const of = (name, what) => median(results[name].map((r) => r[what]));
  for (const name of Object.keys(results))
    console.log(
      `${String(n).padStart(6)} tokens  ${name.padEnd(15)} prompt ${of(name, "prompt").toFixed(1).padStart(7)} tokens/s   generation ${of(name, "token").toFixed(2).padStart(7)} ms a token`,
    );
  const ratio = (what, invert) => {
    const each = results.mixtape.map((r, i) =>
      invert ? results["node-llama-cpp"][i][what] / r[what] : r[what] / results["node-llama-cpp"][i][what],
    );
    return `${median(each).toFixed(2)} x (${Math.min(...each).toFixed(2)} to ${Math.max(...each).toFixed(2)})`;
  };
  console.log(`${String(n).padStart(6)} tokens  ratio           prompt ${ratio("prompt", false)}   generation ${ratio("token", true)}`);
}
await ours.dispose();
await llama.dispose();
