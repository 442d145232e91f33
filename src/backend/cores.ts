/** How many threads pay on this machine: its physical cores, of those that this process may use. Reads what Linux tells. */
import { readFileSync } from "node:fs";
import { availableParallelism } from "node:os";

/**
 * Physical cores that this process may use, and no more than its control group grants; where the system does not tell, as many
 * as Node.js counts. A second thread on a core shares its vector units and its way to memory: it does not pay here.
 * @param read the text of a file, null where there is none
 */
export function physicalCores(read: (path: string) => string | null = readText): number {
  const allowed = /^Cpus_allowed_list:\s*(.+)$/m.exec(read("/proc/self/status") ?? "")?.[1];
  const cores = new Set<string>();
  for (const cpu of allowed ? cpuList(allowed) : []) {
    const siblings = read(`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`)?.trim();
    if (!siblings) return granted(read, availableParallelism());
    cores.add(siblings);
  }
  return granted(read, cores.size || availableParallelism());
}

/** At most what the control group's quota comes to, at least one. */
function granted(read: (path: string) => string | null, cores: number): number {
  const [quota, period] = (read("/sys/fs/cgroup/cpu.max") ?? "max").trim().split(" ");
  const share = quota === "max" || !(Number(period) > 0) ? Number.POSITIVE_INFINITY : Number(quota) / Number(period);
  return Math.max(1, Math.min(cores, Math.floor(share)));
}

/** The numbers in a list like `0-3,8,10-11`. */
function cpuList(text: string): number[] {
  return text.split(",").flatMap((part) => {
    const [first, last = first] = part.split("-").map(Number);
    return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i);
  });
}

function readText(path: string): string | null {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return null; // another system, or a sandbox that hides it
  }
}
