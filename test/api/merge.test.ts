/** Merging from folder to folder: adapters with a classifier's head, and modules that an adapter holds as a whole. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import {
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  mergeAdapter,
  PeftModel,
  type SequenceClassifier,
  Trainer,
} from "../../src/index.ts";
import { scratch } from "../checkpoint/craft.ts";
import { run } from "../cli/run.ts";
import { GOLDENS, relativeError } from "../goldens.ts";

const BASE = join(GOLDENS, "moe-tiny");
const LABELS = { 0: "billing", 1: "delivery", 2: "other" };
const out = scratch();
const input_ids = [3, 90, 41].map((first) => Array.from({ length: 12 }, (_, i) => 3 + ((first * (i + 1) * 7) % 500)));
const ARGS = { learning_rate: 1e-2, max_steps: 4, logging_steps: 1, save_strategy: "no", per_device_train_batch_size: 3 } as const;

const open: { dispose(): Promise<void> }[] = [];
afterAll(async () => {
  for (const each of open.reverse()) await each.dispose();
});
const kept = <T extends { dispose(): Promise<void> }>(each: T): T => {
  open.push(each);
  return each;
};
const classifier = async (folder: string, options: object = {}) =>
  kept(await AutoModelForSequenceClassification.from_pretrained(folder, { dtype: "fp32", threads: 1, ...options }));
const scores = async (model: Pick<SequenceClassifier, "forward">) => (await model.forward({ input_ids })).logits.data;

test("an adapter with a head becomes a classifier: as merge_and_unload gives it, with the names given, over the command line too", async () => {
  const base = await classifier(BASE, { id2label: LABELS, problem_type: "multi_label_classification" });
  const model = kept(await PeftModel.create(base, { r: 2, target_modules: ["q_proj", "up_proj"], modules_to_save: ["norm"] }));
  const train_dataset = input_ids.map((ids, i) => ({ input_ids: ids, labels: [0, 1, 2].map((c) => Number(c === i)) }));
  const trainer = new Trainer({ model, args: { ...ARGS, output_dir: out }, train_dataset });
  await trainer.train();
  trainer.dispose();
  const adapter = join(out, "adapter");
  await model.save_pretrained(adapter);
  const expected = await scores(model);
  expect(relativeError(await scores(base), expected)).toBeGreaterThan(1e-2);
  expect(relativeError(await scores(kept(await model.merge_and_unload())), expected)).toBeLessThan(1e-5);

  const merged = join(out, "merged");
  const written = await mergeAdapter(BASE, adapter, merged, { id2label: LABELS, problem_type: "multi_label_classification" });
  expect(written.classes).toBe(3);
  const config = JSON.parse(readFileSync(join(merged, "config.json"), "utf8"));
  expect(config).toMatchObject({
    id2label: LABELS,
    label2id: { billing: 0, delivery: 1, other: 2 },
    problem_type: "multi_label_classification",
  });
  expect(config.architectures[0]).toMatch(/ForSequenceClassification$/);
  const again = await classifier(merged);
  expect(again.classifier.labels).toEqual(Object.values(LABELS));
  expect(relativeError(await scores(again), expected)).toBeLessThan(1e-5);
  await expect(AutoModelForCausalLM.from_pretrained(merged)).rejects.toThrow("is a classifier");

  const command = join(out, "command");
  const flags = ["--labels", "billing, delivery,other", "--problem-type", "multi_label_classification"];
  const done = await run(["merge", BASE, adapter, command, ...flags]);
  expect(done.err).not.toContain("mixtape:");
  expect(done.out).toMatch(/matrices merged, a classifier of 3 classes\n$/);
  expect(readFileSync(join(command, "model.safetensors"))).toEqual(readFileSync(join(merged, "model.safetensors")));
  expect(JSON.parse(readFileSync(join(command, "config.json"), "utf8"))).toEqual(config);

  const unnamed = join(out, "unnamed");
  await mergeAdapter(BASE, adapter, unnamed);
  expect((await classifier(unnamed)).classifier.labels).toEqual(["LABEL_0", "LABEL_1", "LABEL_2"]);
  const few = await run(["merge", BASE, adapter, join(out, "few"), "--labels", "one,two"]);
  expect([few.code, few.err]).toEqual([1, expect.stringContaining("--labels names 2 classes")]);
  await expect(mergeAdapter(BASE, join(BASE, "lora-final"), join(out, "none"), { id2label: LABELS })).rejects.toThrow(
    "has no head 'score' whose classes could have names",
  );
}, 60_000);
