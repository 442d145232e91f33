/** Groups of rows of Parquet files: how many are kept, and that shuffling then keeps to groups. */
import { expect, test } from "vitest";
import { Groups } from "../../../src/train/data/parquet.ts";

const MIB = 1024 ** 2;

test("groups are kept up to 128 MiB, the one just read always, the one unused for longest goes first", async () => {
  const groups = new Groups();
  const reads: string[] = [];
  const get = (key: string, bytes: number) =>
    groups.get(key, bytes, async () => {
      reads.push(key);
      return [{ key }];
    });
  await get("a", 60 * MIB);
  await get("b", 60 * MIB);
  expect(await get("a", 60 * MIB)).toEqual([{ key: "a" }]);
  expect([reads, groups.complete]).toEqual([["a", "b"], true]);
  await get("c", 60 * MIB); // b was used before a
  expect(groups.complete).toBe(false);
  await get("a", 60 * MIB);
  expect(reads).toEqual(["a", "b", "c"]);
  await get("b", 60 * MIB);
  expect(reads).toEqual(["a", "b", "c", "b"]);
  await get("large", 500 * MIB);
  await get("large", 500 * MIB);
  expect(reads).toEqual(["a", "b", "c", "b", "large"]);
});
