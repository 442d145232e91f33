/** `forward`: batches with padding, hidden states and routing, in the documented shapes. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AutoModelForCausalLM, type CausalLM, type NamedTensor } from "../../src/api/model.ts";
import { type Goldens, openGoldens, relativeError } from "../goldens.ts";

/** Rows [from, to) of [rows, width], whatever the leading sizes are. */
function rows<T extends Float32Array | Int32Array>({ dims, data }: NamedTensor<T>, from: number, to: number): T {
  const width = dims[dims.length - 1];
  return data.slice(from * width, to * width) as T;
}

const VARIANTS = [
  { variant: "moe-tiny", layers: 4, hidden: 64, vocab: 512, mixtures: [1, 2, 3], experts: 8, chosen: 2 },
  { variant: "moe-bias", layers: 3, hidden: 48, vocab: 160, mixtures: [0, 1, 2], experts: 6, chosen: 3 },
  { variant: "moe-ragged", layers: 5, hidden: 44, vocab: 131, mixtures: [1, 3], experts: 7, chosen: 2 },
  { variant: "dense-bias", layers: 2, hidden: 44, vocab: 131, mixtures: [], experts: 0, chosen: 0 },
];

describe.each(VARIANTS)("$variant", ({ variant, layers, hidden, vocab, mixtures, experts, chosen }) => {
  let model: CausalLM;
  let goldens: Goldens;
  beforeAll(async () => {
    goldens = await openGoldens(variant);
    model = await AutoModelForCausalLM.from_pretrained(goldens.folder, { dtype: "fp32", threads: 1, kv_cache_tokens: 1024 });
  });
  afterAll(() => model.dispose());

  test.each(["left", "right"])("two rows, padding on the %s", async (side) => {
    const [short, long] = [await goldens.ids(7), await goldens.ids(33)];
    const filler = new Array(26).fill(0);
    const mask = [...short.map(() => 1)];
    const start = side === "left" ? 26 : 0;
    const out = await model.forward({
      input_ids: [side === "left" ? [...filler, ...short] : [...short, ...filler], long],
      attention_mask: [side === "left" ? [...filler, ...mask] : [...mask, ...filler], long.map(() => 1)],
      output_hidden_states: true,
      output_router_logits: true,
    });

    const places = [
      [7, start, start + 7],
      [33, 33, 66],
    ] as const;
    expect(out.logits.dims).toEqual([2, 33, vocab]);
    expect(out.hidden_states?.length).toBe(layers + 1);
    expect(out.router_logits?.map((r) => r.layer)).toEqual(mixtures);
    for (const [n, from, to] of places) {
      const recorded = async (name: string) => (await goldens.tensor(`forward.${n}.${name}`)).data;
      expect(relativeError(rows(out.logits, from, to), await recorded("logits"))).toBeLessThan(2e-4);
      const states = await recorded("hidden_states"); // [layers + 1, n, hidden]
      for (const [i, state] of (out.hidden_states ?? []).entries()) {
        expect(state.dims).toEqual([2, 33, hidden]);
        expect(relativeError(rows(state, from, to), states.subarray(i * n * hidden, (i + 1) * n * hidden))).toBeLessThan(2e-4);
      }
      for (const [i, layer] of (out.router_logits ?? []).entries()) {
        expect([layer.logits.dims, layer.experts.dims, layer.weights.dims]).toEqual([
          [66, experts],
          [66, chosen],
          [66, chosen],
        ]);
        expect(layer.experts.data).toBeInstanceOf(Int32Array);
        expect(relativeError(rows(layer.logits, from, to), await recorded(`router.${i}.logits`))).toBeLessThan(2e-4);
        expect(rows(layer.experts, from, to)).toEqual(await recorded(`router.${i}.experts`));
        const weights = await recorded(`router.${i}.weights`);
        for (const [j, w] of rows(layer.weights, from, to).entries()) expect(Math.abs(w - weights[j])).toBeLessThan(1e-5);
      }
    }
    const [padFrom, padTo] = side === "left" ? [0, 26] : [7, 33];
    for (const tensor of [out.logits, ...(out.hidden_states ?? [])])
      expect(
        rows(tensor, padFrom, padTo).every((x) => x === 0),
        "padding holds zeros",
      ).toBe(true);
  });

  test("returns only what was requested", async () => {
    const input_ids = [await goldens.ids(7)];
    expect(Object.keys(await model.forward({ input_ids }))).toEqual(["logits"]);
    expect(Object.keys(await model.forward({ input_ids, output_hidden_states: true }))).toEqual(["logits", "hidden_states"]);
    expect(Object.keys(await model.forward({ input_ids, output_router_logits: true }))).toEqual(["logits", "router_logits"]);
  });
});

test("in pieces of 16 tokens, every number is the same", async () => {
  const goldens = await openGoldens("moe-tiny");
  const load = (chunk_size: number) =>
    AutoModelForCausalLM.from_pretrained(goldens.folder, { dtype: "fp32", threads: 1, kv_cache_tokens: 1024, chunk_size });
  const [whole, pieces] = [await load(512), await load(16)];
  const ask = { input_ids: [await goldens.ids(130)], output_hidden_states: true, output_router_logits: true };
  const [a, b] = [await whole.forward(ask), await pieces.forward(ask)];
  expect(relativeError(b.logits.data, a.logits.data)).toBeLessThan(1e-5);
  b.hidden_states?.forEach((h, i) => {
    expect(relativeError(h.data, a.hidden_states?.[i].data ?? [])).toBeLessThan(1e-5);
  });
  b.router_logits?.forEach((r, i) => {
    expect(r.experts).toEqual(a.router_logits?.[i].experts);
  });
  await Promise.all([whole.dispose(), pieces.dispose()]);
});

test("while others generate, neither affects the other", async () => {
  const goldens = await openGoldens("moe-tiny");
  const model = await AutoModelForCausalLM.from_pretrained(goldens.folder, { dtype: "fp32", threads: 1, kv_cache_tokens: 1024 });
  const [p7, p33] = [await goldens.ids(7), await goldens.ids(33)];
  const alone = await model.forward({ input_ids: [p33] });
  const answer = model.generate({ input_ids: [p7], max_new_tokens: 24, eos_token_id: null });
  const beside = await Promise.all([1, 2, 3].map(() => model.forward({ input_ids: [p33] })));
  for (const each of beside) expect(each).toEqual(alone);
  expect((await answer)[0].slice(7)).toEqual(goldens.greedy[7]);
  expect(model.engine.cache.free).toBe(model.engine.cache.count);
  await model.dispose();
  await expect(model.forward({ input_ids: [p7] })).rejects.toThrow("the model has been disposed of");
});
