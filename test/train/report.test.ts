/** The files of a run's log: TensorBoard's events parse with a protobuf library, and a run that goes on rewrites what comes again. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import protobuf from "protobufjs";
import { expect, test } from "vitest";
import { trainingArguments } from "../../src/train/arguments.ts";
import { crc32c } from "../../src/train/crc.ts";
import { EventFile } from "../../src/train/events.ts";
import { newState } from "../../src/train/history.ts";
import { reporter } from "../../src/train/report.ts";
import { scratch } from "../checkpoint/craft.ts";

const folder = scratch();
const { root } = protobuf.parse(`
  syntax = "proto3";
  message SessionLog { int32 status = 1; }
  message Value { string tag = 1; float simple_value = 2; }
  message Summary { repeated Value value = 1; }
  message Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; SessionLog session_log = 7; }
`);
const Event = root.lookupType("Event");

/** The events of a file, with both checksums of each record checked. */
function events(path: string) {
  const data = readFileSync(path);
  const masked = (part: Buffer) => {
    const crc = crc32c(part);
    return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
  };
  const found: Record<string, unknown>[] = [];
  for (let at = 0; at < data.length; ) {
    const length = Number(data.readBigUInt64LE(at));
    expect(data.readUInt32LE(at + 8)).toBe(masked(data.subarray(at, at + 8)));
    const record = data.subarray(at + 12, at + 12 + length);
    expect(data.readUInt32LE(at + 12 + length)).toBe(masked(record));
    found.push(Event.toObject(Event.decode(record), { longs: Number }));
    at += 16 + length;
  }
  return found;
}

test("CRC-32C has the values of RFC 3720", () => {
  expect(crc32c(Buffer.from("123456789"))).toBe(0xe3069283);
  expect(crc32c(new Uint8Array(32))).toBe(0x8a9136aa);
  expect(crc32c(new Uint8Array(32).fill(255))).toBe(0x62a8ab43);
});

test("an event file holds its version, where it begins, and numbers by tag", () => {
  const file = new EventFile(join(folder, "events"), 300);
  file.add(300, { "train/loss": 1.5, 损失: -0.25 });
  file.add(2 ** 31, { "train/loss": Number.NaN });
  file.close();
  const [version, start, first, last] = events(file.path);
  expect(version.fileVersion).toBe("brain.Event:2");
  expect(start).toMatchObject({ step: 300, sessionLog: { status: 1 } });
  expect(first).toMatchObject({
    step: 300,
    summary: {
      value: [
        { tag: "train/loss", simpleValue: 1.5 },
        { tag: "损失", simpleValue: -0.25 },
      ],
    },
  });
  expect(Math.abs(Date.now() / 1000 - (first.wallTime as number))).toBeLessThan(60);
  expect(last).toMatchObject({ step: 2 ** 31, summary: { value: [{ simpleValue: Number.NaN }] } });
});

test("log.jsonl and events of a run, and of one that goes on from an earlier step", async () => {
  const output_dir = join(folder, "run");
  const args = trainingArguments({ output_dir, report_to: ["jsonl", "tensorboard"] });
  const control = { should_training_stop: false, should_save: false, should_evaluate: false };
  const run = async (before: number[], entries: number[]) => {
    const state = newState();
    state.global_step = before.length;
    state.log_history = before.map((loss, i) => ({ step: i + 1, epoch: 0, loss }));
    const reports = args.report_to.map(reporter);
    for (const each of reports) await each.on_train_begin?.({ args, state, control });
    for (const [i, loss] of entries.entries())
      for (const each of reports)
        await each.on_log?.({ args, state, control, logs: { step: before.length + i + 1, epoch: 0, loss, eval_loss: loss / 2 } });
    for (const each of reports) await each.on_train_end?.({ args, state, control });
  };
  await run([], [4, 3, 2]);
  await run([4], [3.5]);
  const lines = readFileSync(join(output_dir, "log.jsonl"), "utf8").trim().split("\n");
  expect(lines.map((line) => JSON.parse(line).loss)).toEqual([4, 3.5]);
  const files = readdirSync(join(output_dir, "runs")).sort();
  expect(files).toHaveLength(2);
  const later = events(join(output_dir, "runs", files[1]));
  expect(later[1]).toMatchObject({ step: 2, sessionLog: { status: 1 } });
  const { value } = later[2].summary as { value: { tag: string; simpleValue?: number }[] };
  expect(Object.fromEntries(value.map((v) => [v.tag, v.simpleValue ?? 0]))).toEqual({
    "train/epoch": 0,
    "train/loss": 3.5,
    "eval/loss": 1.75,
  });
});
