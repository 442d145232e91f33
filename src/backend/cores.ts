/** The default number of threads: the physical cores that this process may use, as Linux reports them. */
import { availableParallelism } from "node:os";
import { groupsOf, type Read, readText } from "./cgroup.ts";

/**
 * Physical cores that this process may use, capped by the quota of its control groups; if the system does not report them, Node.js's
 * count. Two threads on a core share its vector units and memory bandwidth, so a second thread does not pay off here.
 * @param read returns the text of a file, or null if there is none
 */
export function physicalCores(read: Read = readText): number {
  const allowed = /^Cpus_allowed_list:\s*(.+)$/m.exec(read("/proc/self/status") ?? "")?.[1];
  const cores = new Set<string>();
  for (const cpu of allowed ? cpuList(allowed) : []) {
    const siblings = read(`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`)?.trim();
    if (!siblings) return granted(read, availableParallelism());
    cores.add(siblings);
  }
  return granted(read, cores.size || availableParallelism());
}

/** Caps a number of cores at the smallest quota of the control groups, but at no less than one. */
function granted(read: Read, cores: number): number {
  const groups = groupsOf("cpu", read);
  const quotas = (groups?.folders ?? ["/sys/fs/cgroup"]).map((folder) => {
    const [quota, period] =
      groups?.version === 1
        ? ["cpu.cfs_quota_us", "cpu.cfs_period_us"].map((name) => read(`${folder}/${name}`))
        : (read(`${folder}/cpu.max`) ?? "max").split(" ");
    return Number(quota) > 0 && Number(period) > 0 ? Number(quota) / Number(period) : Number.POSITIVE_INFINITY;
  });
  return Math.max(1, Math.min(cores, ...quotas.map(Math.floor)));
}

/** Parses a list of numbers like `0-3,8,10-11`. */
function cpuList(text: string): number[] {
  return text.split(",").flatMap((part) => {
    const [first, last = first] = part.split("-").map(Number);
    return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i);
  });
}
