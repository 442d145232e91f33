/** Writes recordings for running native/replay.cpp by hand: `npx tsx test/backend/record.ts FOLDER`, then `replay all 2 FOLDER/cases.replay`. */
import { mkdirSync } from "node:fs";
import { recordAll } from "./replay.ts";

const folder = process.argv[2];
if (!folder) throw new Error("usage: record.ts FOLDER");
mkdirSync(folder, { recursive: true });
const { file, count } = await recordAll(folder);
console.log(`${count} cases: ${file}`);
