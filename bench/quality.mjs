/**
 * What rounding costs: perplexity over windows of a text, and how often the likeliest next token stays the same, for several
 * settings of one model, or several models, compared with the first. Each setting is MODEL[:DTYPE[:CACHE]]. It measures no time and
 * has no rounds; every window is computed in full, since `forward` does not use the prefix cache. With --divergence, also the mean
 * Kullback-Leibler divergence from the first model's distribution over the next token, in nats; the first model is then computed beside
 * each of the others.
 *
 *   npm run build && node bench/quality.mjs --text corpus.txt [--windows 24] [--length 1024] default:bf16:fp32 default:int8:fp16 default:int8:int8
 */
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { AutoModelForCausalLM, AutoTokenizer } from "../dist/index.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    text: { type: "string", multiple: true, default: [] },
    windows: { type: "string", default: "24" },
    length: { type: "string", default: "1024" },
    divergence: { type: "boolean", default: false },
    json: { type: "boolean", default: false },
  },
});
if (!values.text.length || !positionals.length)
  throw new Error("usage: quality.mjs --text FILE... [--divergence] MODEL[:DTYPE[:CACHE]]...");
const length = Number(values.length);
const wanted = Number(values.windows);

const tokenizer = await AutoTokenizer.from_pretrained(positionals[0].split(":")[0]);
const windows = [];
const each = Math.ceil(wanted / values.text.length); // as many of each text
for (const file of values.text) {
  const ids = tokenizer.encode(readFileSync(file, "utf8").slice(0, each * length * 8), { add_special_tokens: false });
  for (let i = 0; i < each && (i + 1) * length <= ids.length; i++) windows.push(ids.slice(i * length, (i + 1) * length));
}

/** Sum of negative log-likelihoods, and the likeliest token at each position. */
function judge(logits, ids, vocab) {
  let nll = 0;
  const best = new Int32Array(ids.length - 1);
  for (let t = 0; t + 1 < ids.length; t++) {
    const row = logits.subarray(t * vocab, (t + 1) * vocab);
    let top = 0;
    for (let i = 1; i < vocab; i++) if (row[i] > row[top]) top = i;
    let sum = 0;
    for (let i = 0; i < vocab; i++) sum += Math.exp(row[i] - row[top]);
    nll += Math.log(sum) + row[top] - row[ids[t + 1]];
    best[t] = top;
  }
  return { nll, best };
}

/** Sum over positions of the Kullback-Leibler divergence of two models' distributions. */
function diverge(exact, other, vocab) {
  let total = 0;
  for (let at = 0; at + vocab < exact.length; at += vocab) {
    const [p, q] = [exact.subarray(at, at + vocab), other.subarray(at, at + vocab)];
    const [a, b] = [logSum(p), logSum(q)];
    for (let i = 0; i < vocab; i++) total += Math.exp(p[i] - a) * (p[i] - a - q[i] + b);
  }
  return total;
}

function logSum(row) {
  let [top, sum] = [row[0], 0];
  for (let i = 1; i < row.length; i++) if (row[i] > top) top = row[i];
  for (let i = 0; i < row.length; i++) sum += Math.exp(row[i] - top);
  return Math.log(sum) + top;
}

const results = [];
let base;
for (const setting of positionals) {
  const [model, dtype = "auto", cache] = setting.split(":");
  const loaded = await AutoModelForCausalLM.from_pretrained(model, {
    dtype,
    ...(cache ? { kv_cache_dtype: cache } : {}),
    kv_cache_tokens: length,
  });
  let [nll, tokens, same, divergence] = [0, 0, 0, 0];
  const choices = [];
  for (const [w, ids] of windows.entries()) {
    const { logits } = await loaded.forward({ input_ids: [ids] });
    const judged = judge(logits.data, ids, logits.dims[2]);
    nll += judged.nll;
    tokens += ids.length - 1;
    choices.push(judged.best);
    if (values.divergence && base) {
      const exact = await base.model.forward({ input_ids: [ids] });
      divergence += diverge(exact.logits.data, logits.data, logits.dims[2]);
    }
    if (base) for (let t = 0; t < judged.best.length; t++) same += judged.best[t] === base.choices[w][t] ? 1 : 0;
  }
  const first = base === undefined;
  if (!first || !values.divergence) await loaded.dispose();
  const perplexity = Math.exp(nll / tokens);
  base ??= { perplexity, choices, model: loaded };
  const result = {
    setting,
    perplexity,
    change: perplexity / base.perplexity - 1,
    same: first ? 1 : same / tokens,
    ...(values.divergence ? { divergence: divergence / tokens } : {}),
  };
  results.push(result);
  if (!values.json)
    console.log(
      `${setting.padEnd(44)} perplexity ${perplexity.toFixed(4).padStart(10)}  ${(100 * result.change).toFixed(3).padStart(8)} %   same next token ${(100 * result.same).toFixed(2)} %${values.divergence ? `   divergence ${result.divergence.toFixed(5)}` : ""}`,
    );
}
if (values.divergence) await base.model.dispose();
if (values.json) console.log(JSON.stringify({ windows: windows.length, length, results }));
