/**
 * Where mapped weights are kept. Reading gigabytes through pages of 4 KiB costs more than reading the memory itself, so they move to
 * huge pages: anonymous memory, filled in the background while the model already answers from the mapping. What the system has put
 * on huge pages of its page cache stays there. Decides whether and when; the addon moves.
 */

import type { Addon, Handle } from "./addon.ts";
import type { Memory, Placement, Residence } from "./backend.ts";
import { type Read, readText } from "./cgroup.ts";

/** Weights smaller than this are hardly faster on huge pages, and would be moved while the first answer is computed. */
const LEAST_BYTES = 2 ** 28;
/** Memory that must stay free for everything else. */
const MARGIN_BYTES = 2 ** 29;
/** How often free memory is checked while weights move. */
const WATCH_MS = 200;

/** Why this system has no huge pages for a process that asks; null if it has. */
export function noHugePages(read: Read = readText): string | null {
  const enabled = read("/sys/kernel/mm/transparent_hugepage/enabled");
  if (enabled === null) return "this system has no transparent huge pages";
  return enabled.includes("[never]") ? "/sys/kernel/mm/transparent_hugepage/enabled is 'never'" : null;
}

/** Whether a file is on a tmpfs with huge pages: mapped from there, it is on huge pages that all processes share. */
export function onSharedHugePages(file: string, read: Read = readText): boolean {
  let mount = { at: "", options: "" };
  // A line is `36 35 98:0 /root /mount/point rw,... - tmpfs tmpfs rw,huge=always`; blanks in paths are written \040.
  for (const line of (read("/proc/self/mountinfo") ?? "").split("\n")) {
    const [place, system] = line.split(" - ");
    const at = place.split(" ")[4]?.replace(/\\(\d{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
    if (!system || at === undefined || at.length < mount.at.length) continue;
    if (file === at || file.startsWith(at.endsWith("/") ? at : `${at}/`)) mount = { at, options: system };
  }
  return /^tmpfs /.test(mount.options) && /\bhuge=(always|within_size|advise)\b/.test(mount.options);
}

/** Why `auto` leaves this many bytes of these files where they are; null if it moves them. */
export function reasonToStay(bytes: number, files: readonly string[], { free }: Memory, read: Read = readText): string | null {
  if (bytes < LEAST_BYTES) return `below ${LEAST_BYTES / 2 ** 20} MiB it makes little difference`;
  if (files.length > 0 && files.every((file) => onSharedHugePages(file, read)))
    return "the file is already on huge pages, which processes share";
  return lacking(bytes, free, read);
}

/** What is lacking to move this many bytes; null if nothing is. */
function lacking(bytes: number, free: number, read: Read = readText): string | null {
  const none = noHugePages(read);
  if (none !== null || bytes + MARGIN_BYTES <= free) return none;
  return `the weights take ${gib(bytes)} GiB of memory beside the mapped file, and ${gib(free)} GiB are free`;
}

/**
 * Starts to move weights, if that is wanted and possible; with `resident`, resolves when it is done.
 * @throws RangeError with `resident`, if memory or huge pages are lacking
 * @param files real paths of the files that the weights are mapped from
 * @returns where the weights are, now and later, and when the last has moved; `unwatch` must be called before they are disposed of
 */
export async function settle(
  addon: Addon,
  handle: Handle,
  wanted: Residence,
  memory: () => Memory,
  threads: number,
  files: readonly string[] = [],
): Promise<{ readonly placement: () => Placement; readonly settled: Promise<void>; readonly unwatch: () => void }> {
  const { bytes } = addon.movedWeights(handle);
  let refused = "";
  const placement = (): Placement => {
    const { moved, kept, moving, why } = addon.movedWeights(handle);
    const all = bytes > 0 && moved + kept === bytes;
    const state = moving ? "moving" : all && moved >= kept ? "resident" : "mapped";
    const shared = all && kept > 0 ? `${gib(kept)} GiB are on huge pages of the page cache already` : "";
    return { state, movedBytes: moved, mappedBytes: bytes, why: refused || why || shared };
  };
  const still = { placement, settled: Promise.resolve(), unwatch: () => {} };
  if (wanted === "mapped" || bytes === 0) return still;
  const { free, total } = memory();
  refused = (wanted === "auto" ? reasonToStay(bytes, files, { free, total }) : lacking(bytes, free)) ?? "";
  if (refused) {
    if (wanted === "resident") throw new RangeError(`weights 'resident' is not possible: ${refused}; use 'auto' or 'mapped'`);
    return still;
  }
  // Where file and copy do not fit memory together, what has moved leaves the page cache.
  addon.moveWeights(handle, wanted === "resident" ? threads : 1, wanted === "auto", 2 * bytes + MARGIN_BYTES > total);
  let unwatch = () => {};
  const settled = new Promise<void>((resolve) => {
    const watch = setInterval(() => {
      if (!addon.movedWeights(handle).moving) unwatch();
      else if (memory().free < MARGIN_BYTES / 2) addon.stopMoving(handle, `only ${gib(memory().free)} GiB of memory were left`);
    }, WATCH_MS);
    if (wanted === "auto") watch.unref();
    unwatch = () => {
      clearInterval(watch);
      resolve();
    };
  });
  if (wanted === "resident") {
    await settled;
    const { state, why } = placement();
    if (state !== "resident") throw new RangeError(`weights 'resident' is not possible: ${why}; use 'auto' or 'mapped'`);
  }
  return { placement, settled, unwatch };
}

function gib(bytes: number): string {
  return (bytes / 2 ** 30).toFixed(1);
}
