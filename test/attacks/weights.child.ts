/** For weights.test.ts: generates with two models while something happens to the file of the first; prints what each said as JSON. */
import { readFileSync, renameSync, truncateSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { loadModel } from "../../src/api/load.ts";
import { GREEDY } from "../../src/engine/sampling.ts";

const [what, first, second] = process.argv.slice(2);
const file = join(first, "model.safetensors");
const happenings: Record<string, () => void> = {
  truncate: () => truncateSync(file, 100_000),
  empty: () => truncateSync(file, 0),
  "copy over": () => writeFileSync(file, readFileSync(join(second, "model.safetensors"))),
  touch: () => utimesSync(file, new Date(), new Date()),
  rename: () => {
    writeFileSync(`${file}.new`, readFileSync(join(second, "model.safetensors")));
    renameSync(`${file}.new`, file);
  },
};
/** Enough rows that one step takes a while: the file goes away in the middle of it. */
const prompt = what === "truncate within a step" ? Array.from({ length: 1500 }, (_, i) => 5 + (i % 100)) : [5, 6, 7];
if (prompt.length > 3) happenings["truncate within a step"] = () => truncateSync(file, 4096);
const load = (folder: string) => loadModel(folder, { threads: 2, kv_cache_tokens: 4096, chunk_size: 2048 });
const [a, b] = [await load(first), await load(second)];
/** The tokens, and the error if there was one; `each` is called after every token. */
async function answer({ engine }: typeof a, each: (count: number) => void = () => {}, tokens = [5, 6, 7]) {
  const ids: number[] = [];
  try {
    for await (const { id } of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 60 })) each(ids.push(id));
  } catch (error) {
    return { ids, error: (error as Error).message };
  }
  return { ids, error: null };
}
const expected = await answer(b);
if (prompt.length > 3) setTimeout(happenings[what], 100);
const [during, beside] = await Promise.all([
  answer(a, (count) => prompt.length === 3 && count === 8 && happenings[what](), prompt),
  answer(b),
]);
const [after, other] = [await answer(a), await answer(b)];
const lost = [a.engine.lost, b.engine.lost];
await a.engine.dispose();
const again = await load(first).then(
  async (model) => (await answer(model)).error ?? "served",
  (error: Error) => error.message,
);
const served = [beside, other].every(({ error, ids }) => error === null && ids.join() === expected.ids.join());
console.log(JSON.stringify({ tokens: during.ids.length, during: during.error, after: after.error, lost, served, again }));
process.exit(0);
