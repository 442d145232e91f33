/** How much memory a process may use, on simulated machines, and how that affects loading a model. */
import { freemem, totalmem } from "node:os";
import { expect, test } from "vitest";
import { thisMachine, warningsFor } from "../../src/api/room.ts";
import { physicalCores } from "../../src/backend/cores.ts";
import { hostMemory } from "../../src/backend/memory.ts";

const GIB = 2 ** 30;

/** A machine with 16 GiB, 12 of them available, and a process in the groups that `cgroup` lists. */
function machine(cgroup: string, files: Readonly<Record<string, string | number>>) {
  const all: Record<string, string | number> = {
    "/proc/meminfo": `MemTotal:       ${16 * 2 ** 20} kB\nMemFree:        ${2 ** 20} kB\nMemAvailable:   ${12 * 2 ** 20} kB\n`,
    "/proc/self/cgroup": cgroup,
    ...files,
  };
  return (path: string) => (path in all ? `${all[path]}` : null);
}

test("without a control group: the machine's memory, and how much of it is available", () => {
  expect(hostMemory(machine("", {}))).toEqual({ total: 16 * GIB, free: 12 * GIB });
});

test("a group's limit minus its usage, not counting reclaimable file pages", () => {
  const files = {
    "/sys/fs/cgroup/app/memory.max": `${4 * GIB}\n`,
    "/sys/fs/cgroup/app/memory.current": `${3 * GIB}\n`,
    "/sys/fs/cgroup/app/memory.stat": `anon 1000\nfile 5\nactive_file 7\ninactive_file ${2 * GIB}\ntotal_inactive_file 9\n`,
  };
  expect(hostMemory(machine("0::/app\n", files))).toEqual({ total: 4 * GIB, free: 3 * GIB });
});

test("a full group has nothing left, not a negative amount", () => {
  const files = { "/sys/fs/cgroup/memory.max": GIB, "/sys/fs/cgroup/memory.current": GIB + 4096 };
  expect(hostMemory(machine("0::/\n", files))).toEqual({ total: GIB, free: 0 });
});

test("in nested groups, the smallest limit and the smallest remainder apply", () => {
  const files = {
    "/sys/fs/cgroup/pod/app/memory.max": "max\n",
    "/sys/fs/cgroup/pod/app/memory.current": GIB,
    "/sys/fs/cgroup/pod/memory.max": 8 * GIB,
    "/sys/fs/cgroup/pod/memory.current": 7.5 * GIB,
    "/sys/fs/cgroup/memory.max": 6 * GIB,
    "/sys/fs/cgroup/memory.current": 3 * GIB,
  };
  expect(hostMemory(machine("0::/pod/app\n", files))).toEqual({ total: 6 * GIB, free: 0.5 * GIB });
});

test("a container that sees only its own group's files uses those", () => {
  const files = { "/sys/fs/cgroup/memory.max": 2 * GIB, "/sys/fs/cgroup/memory.current": GIB };
  expect(hostMemory(machine("0::/docker/0123\n", files))).toEqual({ total: 2 * GIB, free: GIB });
  expect(hostMemory(machine("0::/../0123\n", files))).toEqual({ total: 2 * GIB, free: GIB });
});

test("no limit, or one larger than the machine, does not count", () => {
  const max = { "/sys/fs/cgroup/app/memory.max": "max\n", "/sys/fs/cgroup/app/memory.current": GIB };
  expect(hostMemory(machine("0::/app\n", max))).toEqual({ total: 16 * GIB, free: 12 * GIB });
  const large = { "/sys/fs/cgroup/app/memory.max": 64 * GIB, "/sys/fs/cgroup/app/memory.current": GIB };
  expect(hostMemory(machine("0::/app\n", large))).toEqual({ total: 16 * GIB, free: 12 * GIB });
});

test("version 1 of control groups", () => {
  const cgroup = "9:name=systemd:/\n4:cpu,memory:/app\n0::/other\n";
  const files = {
    "/sys/fs/cgroup/memory/app/memory.limit_in_bytes": 4 * GIB,
    "/sys/fs/cgroup/memory/app/memory.usage_in_bytes": 2 * GIB,
    "/sys/fs/cgroup/memory/app/memory.stat": `inactive_file 5\ntotal_inactive_file ${GIB}\n`,
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": 20 * GIB,
    "/sys/fs/cgroup/other/memory.max": GIB,
  };
  expect(hostMemory(machine(cgroup, files))).toEqual({ total: 4 * GIB, free: 3 * GIB });
});

test("Node.js's numbers, if the system reports nothing", () => {
  const { total, free } = hostMemory(() => null);
  expect(total).toBe(totalmem());
  expect(Math.abs(free - freemem())).toBeLessThan(totalmem() / 2);
});

test("a model larger than its group's limit causes a warning or an error, with numbers", () => {
  const files = { "/sys/fs/cgroup/app/memory.max": 4 * GIB, "/sys/fs/cgroup/app/memory.current": GIB };
  const here = thisMachine(4, hostMemory(machine("0::/app\n", files)));
  const weights = (stored: "bf16" | "int8") => [
    { name: "w", stored: "bf16" as const, dtype: stored, shape: [4 * 2 ** 20, 1024], parts: [{ file: "f", offset: 0, bytes: 8 * GIB }] },
  ];
  expect(warningsFor(weights("bf16"), 4, here)).toEqual([
    expect.stringMatching(/^the weights are 8\.0 GiB and there are 4\.0 GiB of memory/),
  ]);
  expect(() => warningsFor(weights("int8"), 4, here)).toThrow(
    /^converting the weights takes 4\.1 GiB of memory, and 3\.0 GiB are free; .*mixtape quantize/,
  );
});

test("CPU quotas of nested groups count too, in either version", () => {
  const status = { "/proc/self/status": "Cpus_allowed_list:\t0-7\n" };
  const cores = Object.fromEntries(
    Array.from({ length: 8 }, (_, i) => [`/sys/devices/system/cpu/cpu${i}/topology/thread_siblings_list`, `${i}\n`]),
  );
  const second = { "/sys/fs/cgroup/pod/app/cpu.max": "max 100000\n", "/sys/fs/cgroup/pod/cpu.max": "300000 100000\n" };
  expect(physicalCores(machine("0::/pod/app\n", { ...status, ...cores, ...second }))).toBe(3);
  const first = { "/sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "250000\n", "/sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000\n" };
  expect(physicalCores(machine("1:cpu,cpuacct:/app\n", { ...status, ...cores, ...first }))).toBe(2);
  const none = { "/sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000\n" };
  expect(physicalCores(machine("1:cpu,cpuacct:/app\n", { ...status, ...cores, ...none }))).toBe(8);
});
