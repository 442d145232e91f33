/** One generation step: builds the model's inputs for a batch and distributes its outputs to the sequences. */
import type { Numbers } from "../backend/backend.ts";
import { OUTPUTS, type Programs } from "./programs.ts";
import { layOut } from "./sampling.ts";
import type { BatchEntry } from "./scheduler.ts";
import type { GeneratedToken, TokenLogprob, TokenRouting } from "./sequence.ts";
import type { Part, Steps } from "./steps.ts";

export interface Drawn {
  readonly entries: readonly BatchEntry[];
  /** One per entry that samples, in order; the id is `NONE_LEFT` or `NOT_FINITE` if no token could be chosen. */
  readonly tokens: readonly GeneratedToken[];
  readonly rows: number;
  /** Each mixture layer's experts of all rows; null unless requested. */
  readonly experts: readonly Int32Array[] | null;
}

/**
 * Computes a batch.
 * @param masks what each entry's constraint allows; null: no entry has one
 * @param wantExperts return the experts of all rows, even if no request asks for its own
 * @param started called once native code is running
 */
export async function drawBatch(
  steps: Steps,
  { model }: Programs,
  entries: readonly BatchEntry[],
  masks: readonly (Int32Array | null)[] | null,
  wantExperts: boolean,
  started: () => void,
): Promise<Drawn> {
  const picked: number[] = [];
  const sampled: Parameters<typeof layOut>[0][number][] = [];
  let [rows, most] = [0, 0];
  let routing = wantExperts;
  entries.forEach(({ sequence: s, count, samples }, i) => {
    rows += count;
    if (!samples) return;
    picked.push(rows - 1);
    sampled.push({ sampling: s.request.sampling, tokens: s.tokens, promptCount: s.promptCount, mask: masks?.[i] });
    most = Math.max(most, s.request.topLogprobs ?? 0);
    routing ||= s.request.wantRouting ?? false;
  });
  const outs = picked.length;
  const ids = new Int32Array(outs);
  const logprobs = new Float32Array(outs);
  const [topIds, topValues] = [new Int32Array(outs * most), new Float32Array(outs * most)];
  const scores = new Float32Array(outs * (model.classes ?? 0));
  const outputs: Record<string, Numbers> = {};
  if (model.classes !== null) outputs[OUTPUTS.logits] = scores;
  else Object.assign(outputs, { [OUTPUTS.token]: ids, [OUTPUTS.logprob]: logprobs });
  if (most > 0) Object.assign(outputs, { [OUTPUTS.topTokens]: topIds, [OUTPUTS.topLogprobs]: topValues });
  const { chosen, layers } = model.mixtures;
  const routed = (routing ? layers : []).map((layer) => {
    const { experts, weights } = OUTPUTS.routing(layer);
    const values = { experts: new Int32Array(rows * chosen), weights: new Float32Array(rows * chosen) };
    Object.assign(outputs, { [experts]: values.experts, [weights]: values.weights });
    return values;
  });
  const parts = entries.map(
    ({ sequence: s, count }): Part => ({
      ids: s.tokens.slice(s.cached, s.cached + count),
      start: s.cached,
      pages: s.pages,
      ...(s.request.positions ? { position: (index, axis) => s.position(index, axis) } : {}),
      ...(s.adapter ? { adapter: s.adapter.slot } : {}),
      ...(s.request.embeddings ? { embeddings: s.embeddings(s.cached, count) } : {}),
    }),
  );
  await steps.run(parts, Int32Array.from(picked), model.classes === null ? layOut(sampled) : null, outputs, most, started);

  const topOf = (out: number, count: number): TokenLogprob[] =>
    Array.from({ length: count }, (_, i) => ({ id: topIds[out * most + i], logprob: topValues[out * most + i] }));
  const routingOf = (row: number): TokenRouting => {
    const all = { experts: new Int32Array(routed.length * chosen), weights: new Float32Array(routed.length * chosen) };
    routed.forEach((layer, l) => {
      all.experts.set(layer.experts.subarray(row * chosen, (row + 1) * chosen), l * chosen);
      all.weights.set(layer.weights.subarray(row * chosen, (row + 1) * chosen), l * chosen);
    });
    return all;
  };
  const tokens = entries
    .filter((e) => e.samples)
    .map(({ sequence: { request } }, i): GeneratedToken => {
      const { topLogprobs = 0, wantRouting = false } = request;
      return {
        id: ids[i],
        logprob: logprobs[i],
        ...(model.classes === null ? {} : { scores: scores.slice(i * model.classes, (i + 1) * model.classes) }),
        ...(topLogprobs > 0 ? { top: topOf(i, topLogprobs) } : {}),
        ...(wantRouting ? { routing: routingOf(picked[i]) } : {}),
      };
    });
  return { entries, tokens, rows, experts: wantExperts ? routed.map((layer) => layer.experts) : null };
}
