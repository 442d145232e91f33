/** The Linux control groups that this process belongs to. Knows where their files are, not what they mean. */
import { readFileSync } from "node:fs";

/** Returns the text of a file, or null if there is none. */
export type Read = (path: string) => string | null;

export interface Groups {
  readonly version: 1 | 2;
  /** Folders of the group and its ancestors, innermost first. A container may see only the outermost. */
  readonly folders: readonly string[];
}

/**
 * The groups that limit this process for a controller such as `memory`; null if none is mounted at the usual place. A controller
 * that version 1 has is not available in version 2.
 */
export function groupsOf(controller: string, read: Read): Groups | null {
  const lines = (read("/proc/self/cgroup") ?? "").split("\n").map((line) => /^(\d+):([^:]*):(.*)$/.exec(line));
  const first = lines.find((m) => m?.[2].split(",").includes(controller));
  if (first) return { version: 1, folders: upward(`/sys/fs/cgroup/${controller}`, first[3]) };
  const second = lines.find((m) => m?.[1] === "0" && m[2] === "");
  return second ? { version: 2, folders: upward("/sys/fs/cgroup", second[3]) } : null;
}

function upward(root: string, path: string): string[] {
  const names = path.split("/").filter((name) => name !== "" && name !== ".."); // a namespace may be rooted below the group
  return [...names.keys(), names.length].reverse().map((n) => [root, ...names.slice(0, n)].join("/"));
}

export function readText(path: string): string | null {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return null; // not Linux, or a sandbox hides it
  }
}
