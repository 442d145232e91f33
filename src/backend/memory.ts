/** How much memory this process may use: the machine's, or less if a control group limits it. Reads files, measures nothing. */
import { freemem, totalmem } from "node:os";
import type { Memory } from "./backend.ts";
import { type Groups, groupsOf, type Read, readText } from "./cgroup.ts";

/** @param read returns the text of a file, or null if there is none */
export function hostMemory(read: Read = readText): Memory {
  const machine = read("/proc/meminfo") ?? "";
  const groups = groupsOf("memory", read);
  const limits = groups ? groups.folders.flatMap((folder) => limitOf(folder, groups.version, read) ?? []) : [];
  return {
    total: Math.min(kib(machine, "MemTotal") ?? totalmem(), ...limits.map((l) => l.total)),
    free: Math.min(kib(machine, "MemAvailable") ?? freemem(), ...limits.map((l) => l.free)),
  };
}

const FILES = {
  1: { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", reclaimable: "total_inactive_file" },
  2: { limit: "memory.max", used: "memory.current", reclaimable: "inactive_file" },
} as const;

/** A group's limit and what is left of it; null if it has none. Inactive file pages count as free because the kernel can reclaim them. */
function limitOf(folder: string, version: Groups["version"], read: Read): Memory | null {
  const files = FILES[version];
  const total = Number.parseInt(read(`${folder}/${files.limit}`) ?? "", 10); // "max", or more than any machine has: no limit
  if (Number.isNaN(total)) return null;
  const used = Number.parseInt(read(`${folder}/${files.used}`) ?? "", 10) || 0;
  const reclaimable = Number(new RegExp(`^${files.reclaimable} (\\d+)$`, "m").exec(read(`${folder}/memory.stat`) ?? "")?.[1] ?? 0);
  return { total, free: Math.max(0, total - Math.max(0, used - reclaimable)) };
}

function kib(meminfo: string, name: string): number | null {
  const found = new RegExp(`^${name}:\\s+(\\d+) kB$`, "m").exec(meminfo)?.[1];
  return found === undefined ? null : Number(found) * 1024;
}
