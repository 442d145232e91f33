/** The default number of threads, on simulated machines. */
import { availableParallelism } from "node:os";
import { expect, test } from "vitest";
import { physicalCores } from "../../src/backend/cores.ts";

/** A machine whose CPUs share cores as in `siblings`, by CPU. */
function machine(allowed: string, siblings: readonly string[], cpuMax = "max 100000\n") {
  const files = new Map([
    ["/proc/self/status", `Name:\tnode\nCpus_allowed:\tff\nCpus_allowed_list:\t${allowed}\n`],
    ["/sys/fs/cgroup/cpu.max", cpuMax],
    ...siblings.map((list, cpu) => [`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`, `${list}\n`] as const),
  ]);
  return (path: string) => files.get(path) ?? null;
}

const EIGHT_ON_FOUR = ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"];

test("two threads of one core count once", () => {
  expect(physicalCores(machine("0-7", EIGHT_ON_FOUR))).toBe(4);
});

test("cores that the process may not use do not count", () => {
  expect(physicalCores(machine("0-1,4", EIGHT_ON_FOUR))).toBe(2);
});

test("a container gets no more threads than its quota", () => {
  expect(physicalCores(machine("0-7", EIGHT_ON_FOUR, "250000 100000\n"))).toBe(2);
  expect(physicalCores(machine("0-7", EIGHT_ON_FOUR, "50000 100000\n"))).toBe(1);
});

test("Node.js's count, if the system reports nothing", () => {
  expect(physicalCores(() => null)).toBe(availableParallelism());
  expect(physicalCores(machine("0-7", ["0,4"]))).toBe(availableParallelism()); // some CPUs' files are missing
});
