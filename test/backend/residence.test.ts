/** Weights that move to huge pages: when they do, that nothing changes meanwhile, and what happens where they can't. */
import { cpSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { resolvePretrained } from "../../src/api/find.ts";
import { type Addon, type Handle, openAddon } from "../../src/backend/addon.ts";
import { nativeBackend } from "../../src/backend/native.ts";
import { noHugePages, onSharedHugePages, reasonToStay, settle } from "../../src/backend/residence.ts";
import { AutoModelForCausalLM } from "../../src/index.ts";

const GIB = 2 ** 30;
const HANDLE = {} as Handle;

/** An addon that moves 100 MiB whenever it is asked how far it is. */
function fake(bytes: number) {
  const calls: string[] = [];
  let [moved, moving, why] = [0, false, ""];
  const addon: Pick<Addon, "moveWeights" | "stopMoving" | "movedWeights"> = {
    moveWeights: (_, threads, quietly, dropCached) => {
      calls.push(`${threads} ${quietly ? "quietly" : "at once"}${dropCached ? ", dropping" : ""}`);
      moving = true;
    },
    stopMoving: (_, reason) => {
      [moving, why] = [false, reason];
    },
    movedWeights: () => {
      if (moving) moved = Math.min(bytes, moved + 100 * 2 ** 20);
      if (moved === bytes) moving = false;
      return { bytes, moved, kept: 0, moving, why };
    },
  };
  return { addon: addon as Addon, calls };
}

describe("files on huge pages that processes share", () => {
  const mounts = [
    "30 1 8:1 / / rw,relatime - ext4 /dev/root rw",
    "42 30 0:39 / /mnt/my\\040models rw,relatime - tmpfs tmpfs rw,size=6g,huge=always",
    "43 30 0:40 / /mnt/small rw - tmpfs tmpfs rw,size=6g",
    "44 42 0:41 / /mnt/my\\040models/disk rw - ext4 /dev/sdb rw",
    "45 30 0:42 / /mnt/advise rw - tmpfs tmpfs rw,huge=advise",
    "46 30 0:43 / /mnt/never rw - tmpfs tmpfs rw,huge=never",
  ].join("\n");
  const read = (path: string) => (path === "/proc/self/mountinfo" ? mounts : "always [madvise] never");

  test.each([
    ["/mnt/my models/a/model.safetensors", true],
    ["/mnt/my models/disk/model.safetensors", false],
    ["/mnt/my modelsx/model.safetensors", false],
    ["/mnt/small/model.safetensors", false],
    ["/mnt/advise/model.safetensors", true],
    ["/mnt/never/model.safetensors", false],
    ["/home/model.safetensors", false],
  ])("%s: %s", (file, shared) => expect(onSharedHugePages(file, read)).toBe(shared));

  test("auto leaves them there only if all are", () => {
    const memory = { total: 24 * GIB, free: 20 * GIB };
    expect(reasonToStay(GIB, ["/mnt/advise/1", "/mnt/advise/2"], memory, read)).toBe(
      "the file is already on huge pages, which processes share",
    );
    expect(reasonToStay(GIB, ["/mnt/advise/1", "/home/2"], memory, read)).toBeNull();
  });

  test("nothing is known where the system does not tell", () => {
    expect(onSharedHugePages("/mnt/advise/1", () => null)).toBe(false);
  });
});

describe.skipIf(noHugePages() !== null)("the policy", () => {
  const memory = (free: number) => () => ({ total: 24 * GIB, free });

  test.each<[string, Parameters<typeof settle>[2], number, number, string[], string]>([
    ["auto moves quietly where memory allows it", "auto", GIB, 8 * GIB, ["1 quietly"], ""],
    ["auto drops the file's pages where both do not fit", "auto", 21 * GIB, 23 * GIB, ["1 quietly, dropping"], ""],
    [
      "auto stays mapped where memory does not allow it",
      "auto",
      4 * GIB,
      4 * GIB,
      [],
      "the weights take 4.0 GiB of memory beside the mapped file, and 4.0 GiB are free",
    ],
    ["auto leaves small models alone", "auto", 2 ** 27, 8 * GIB, [], "below 256 MiB it makes little difference"],
    ["mapped stays mapped", "mapped", GIB, 8 * GIB, [], ""],
    ["resident moves with all threads", "resident", 2 ** 27, 8 * GIB, ["2 at once"], ""],
  ])("%s", async (_, wanted, bytes, free, calls, why) => {
    const { addon, calls: made } = fake(bytes);
    const { placement, settled, unwatch } = await settle(addon, HANDLE, wanted, memory(free), 2);
    expect(made).toEqual(calls);
    expect(placement().why).toBe(why);
    expect(placement().state).toBe(calls.length === 0 ? "mapped" : wanted === "resident" ? "resident" : "moving");
    unwatch();
    await settled; // also if it was given up
  });

  test("says when the last has moved", async () => {
    const { placement, settled } = await settle(fake(GIB).addon, HANDLE, "auto", memory(8 * GIB), 2);
    expect(placement().state).toBe("moving");
    await settled;
    expect(placement().state).toBe("resident");
  });

  test("nothing asks about weights that were disposed of while they moved", async () => {
    const { addon } = fake(64 * GIB);
    let asked = 0;
    const movedWeights: Addon["movedWeights"] = (handle) => {
      asked++;
      return addon.movedWeights(handle);
    };
    const counting = { ...addon, movedWeights };
    const { unwatch } = await settle(counting, HANDLE, "auto", memory(100 * GIB), 2);
    unwatch();
    const before = asked;
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect(asked).toBe(before);
  });

  test("resident without the memory for it is an error that says how much is missing", async () => {
    await expect(settle(fake(4 * GIB).addon, HANDLE, "resident", memory(2 * GIB), 2)).rejects.toThrow(
      "weights 'resident' is not possible: the weights take 4.0 GiB of memory beside the mapped file, and 2.0 GiB are free; use 'auto' or 'mapped'",
    );
  });

  test("moving stops when memory runs low, and says so", async () => {
    let free = 8 * GIB;
    const { placement } = await settle(
      fake(64 * GIB).addon,
      HANDLE,
      "auto",
      () => ({ total: 24 * GIB, free: free < GIB ? free : 100 * GIB }),
      2,
    );
    free = GIB / 8;
    await expect.poll(placement, { interval: 300 }).toMatchObject({ state: "mapped", why: "only 0.1 GiB of memory were left" });
  });
});

test("systems without huge pages", () => {
  expect(noHugePages(() => null)).toBe("this system has no transparent huge pages");
  expect(noHugePages(() => "always madvise [never]\n")).toContain("'never'");
  expect(noHugePages(() => "always [madvise] never\n")).toBeNull();
});

test("an unknown place is an error that lists the known ones", async () => {
  await expect(AutoModelForCausalLM.from_pretrained("default", { weights: "disk" as "auto" })).rejects.toThrow(
    "weights 'disk' is not known; known are auto, resident, mapped",
  );
});

describe.skipIf(noHugePages() !== null)("the bundled model", () => {
  const folder = mkdtempSync(join(tmpdir(), "residence-"));
  afterAll(() => rmSync(folder, { recursive: true }));
  const prompt = Array.from({ length: 40 }, (_, i) => 300 + ((i * 7919) % 20_000));
  type Model = Awaited<ReturnType<typeof AutoModelForCausalLM.from_pretrained>>;
  const answer = (model: Model, n = 48) => model.generate({ input_ids: [prompt], max_new_tokens: n, do_sample: false, eos_token_id: [] });
  let mapped: number[][];

  test("resident: on huge pages, with the same answers, also when its file is gone", async () => {
    const plain = await AutoModelForCausalLM.from_pretrained("default", { weights: "mapped" });
    mapped = await answer(plain);
    await plain.dispose();
    cpSync(await resolvePretrained("default"), folder, { recursive: true });
    const handles = watched();
    const model = await AutoModelForCausalLM.from_pretrained(folder, { weights: "resident" });
    const addon = openAddon();
    const [handle] = handles();
    const { bytes, moved } = addon.movedWeights(handle);
    expect(moved).toBe(bytes);
    const { huge, small } = await addon.weightPages(handle);
    expect(huge + small).toBeGreaterThan(40e6);
    expect(huge).toBeGreaterThan(0.9 * (huge + small));
    truncateSync(join(folder, "model.safetensors"), 1000);
    expect(await answer(model)).toEqual(mapped);
    await model.dispose();
  });

  test("answers stay the same to the bit while weights move", async () => {
    for (let round = 0; round < 5; round++) {
      const handles = watched();
      const model = await AutoModelForCausalLM.from_pretrained("default", { weights: "mapped", prefix_cache: false });
      const running = answer(model);
      await new Promise((resolve) => setTimeout(resolve, 5 * round));
      openAddon().moveWeights(handles()[0], 1 + (round % 2), round % 2 === 0, round === 4);
      expect(await running).toEqual(mapped);
      expect(await answer(model)).toEqual(mapped);
      await expect.poll(() => openAddon().movedWeights(handles()[0]), { timeout: 20_000 }).toMatchObject({ moving: false, why: "" });
      expect(await answer(model)).toEqual(mapped);
      await model.dispose();
    }
  });

  test("a model that is disposed of while its weights move leaves nothing behind", async () => {
    const handles = watched();
    const model = await AutoModelForCausalLM.from_pretrained("default", { weights: "mapped" });
    openAddon().moveWeights(handles()[0], 1, true, false);
    await model.dispose();
  });

  test("disposing of weights frees their own memory only, not what took the place where their copies were made", async () => {
    const file = join(folder, "w.bin");
    const bytes = 32 * 2 ** 20;
    writeFileSync(file, new Uint8Array(bytes));
    const backend = nativeBackend({ threads: 1 });
    const source = { name: "w", stored: "f32", dtype: "f32", shape: [bytes / 4096, 1024], parts: [{ file, offset: 0, bytes }] } as const;
    const weights = await backend.load([source], "resident");
    expect(weights.placement()).toMatchObject({ state: "resident", movedBytes: bytes });
    // The system puts new memory into the first gap that is large enough.
    const states = Array.from({ length: 64 }, () => backend.state("f32", [2 ** 18]));
    for (const state of states) state.write(Float32Array.of(7), 0);
    weights.dispose();
    expect(states.map((state) => state.read(0, 1)[0])).toEqual(states.map(() => 7));
    backend.dispose();
  });
});

/** The weights loaded from now on. */
function watched(): () => Handle[] {
  const addon = openAddon();
  const handles: Handle[] = [];
  const load = addon.load;
  addon.load = async (specs) => {
    addon.load = load;
    const handle = await load(specs);
    handles.push(handle);
    return handle;
  };
  return () => handles;
}
