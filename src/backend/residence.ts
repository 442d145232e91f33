/**
 * Where mapped weights are kept. Reading gigabytes through pages of 4 KiB costs more than reading the memory itself, so they move to
 * huge pages: anonymous memory, filled in the background while the model already answers from the mapping. Decides whether and
 * when; the addon moves.
 */

import type { Addon, Handle } from "./addon.ts";
import type { Memory, Placement, Residence } from "./backend.ts";
import { readText } from "./cgroup.ts";

/** Weights smaller than this are hardly faster on huge pages, and would be moved while the first answer is computed. */
const LEAST_BYTES = 2 ** 28;
/** Memory that must stay free for everything else. */
const MARGIN_BYTES = 2 ** 29;
/** How often free memory is checked while weights move. */
const WATCH_MS = 200;

/** Why this system has no huge pages for a process that asks; null if it has. */
export function noHugePages(read: (path: string) => string | null = readText): string | null {
  const enabled = read("/sys/kernel/mm/transparent_hugepage/enabled");
  if (enabled === null) return "this system has no transparent huge pages";
  return enabled.includes("[never]") ? "/sys/kernel/mm/transparent_hugepage/enabled is 'never'" : null;
}

/**
 * Starts to move weights, if that is wanted and possible; with `resident`, resolves when it is done.
 * @throws RangeError with `resident`, if memory or huge pages are lacking
 * @returns where the weights are, now and later; `unwatch` must be called before they are disposed of
 */
export async function settle(
  addon: Addon,
  handle: Handle,
  wanted: Residence,
  memory: () => Memory,
  threads: number,
): Promise<{ readonly placement: () => Placement; readonly unwatch: () => void }> {
  const { bytes } = addon.movedWeights(handle);
  let refused = "";
  const placement = (): Placement => {
    const { moved, moving, why } = addon.movedWeights(handle);
    const state = moving ? "moving" : moved === bytes && bytes > 0 ? "resident" : "mapped";
    return { state, movedBytes: moved, mappedBytes: bytes, why: refused || why };
  };
  if (wanted === "mapped" || bytes === 0 || (wanted === "auto" && bytes < LEAST_BYTES)) return { placement, unwatch: () => {} };
  const { free, total } = memory();
  refused =
    noHugePages() ??
    (bytes + MARGIN_BYTES > free
      ? `the weights take ${gib(bytes)} GiB of memory beside the mapped file, and ${gib(free)} GiB are free`
      : "");
  if (refused) {
    if (wanted === "resident") throw new RangeError(`weights 'resident' is not possible: ${refused}; use 'auto' or 'mapped'`);
    return { placement, unwatch: () => {} };
  }
  // Where file and copy do not fit memory together, what has moved leaves the page cache.
  addon.moveWeights(handle, wanted === "resident" ? threads : 1, wanted === "auto", 2 * bytes + MARGIN_BYTES > total);
  let watch: NodeJS.Timeout | undefined;
  const done = new Promise<void>((resolve) => {
    watch = setInterval(() => {
      if (!addon.movedWeights(handle).moving) {
        clearInterval(watch);
        resolve();
      } else if (memory().free < MARGIN_BYTES / 2) addon.stopMoving(handle, `only ${gib(memory().free)} GiB of memory were left`);
    }, WATCH_MS);
    if (wanted === "auto") watch.unref();
  });
  if (wanted === "resident") {
    await done;
    const { state, why } = placement();
    if (state !== "resident") throw new RangeError(`weights 'resident' is not possible: ${why}; use 'auto' or 'mapped'`);
  }
  return { placement, unwatch: () => clearInterval(watch) };
}

function gib(bytes: number): string {
  return (bytes / 2 ** 30).toFixed(1);
}
