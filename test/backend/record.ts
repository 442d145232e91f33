/**
 * Writes recordings for running native/replay.cpp by hand: `npx tsx test/backend/record.ts FOLDER [PATTERN]`, then `replay all 2
 * FOLDER/cases.replay`. With a pattern, only those whose names match.
 */
import { mkdirSync } from "node:fs";
import { recordAll } from "./replay.ts";

const [folder, pattern] = process.argv.slice(2);
if (!folder) throw new Error("usage: record.ts FOLDER [PATTERN]");
mkdirSync(folder, { recursive: true });
const { file, count } = await recordAll(folder, pattern ? new RegExp(pattern) : undefined);
console.log(`${count} cases: ${file}`);
