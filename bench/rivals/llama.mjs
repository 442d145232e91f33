/** The rival as a subject of the benchmarks: llama.cpp through node-llama-cpp, which answers prompts one at a time. */
import { getLlama, LlamaLogLevel } from "node-llama-cpp";
import { serveSubject } from "../subject.mjs";

await serveSubject(async ({ model, options: { threads, contextSize } }) => {
  const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads });
  const theirs = await llama.loadModel({ modelPath: model, gpuLayers: 0 });
  const context = await theirs.createContext({ contextSize, batchSize: 512, threads });

  async function* generate(tokens, newTokens) {
    const sequence = context.getSequence(); // a new one, which has cached nothing of the last prompt
    try {
      let made = 0;
      for await (const token of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
        yield token;
        if (++made === newTokens) break;
      }
    } finally {
      sequence.dispose();
    }
  }

  async function answer({ prompts, newTokens }) {
    const answers = [];
    for (const tokens of prompts) {
      const start = performance.now();
      const times = [];
      for await (const _ of generate(tokens, newTokens)) times.push(performance.now() - start);
      answers.push({ times });
    }
    return { answers };
  }
  return [{ vocabulary: theirs.fileInfo.metadata.tokenizer.ggml.tokens.length }, answer];
});
