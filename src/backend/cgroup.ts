/** The control groups that this process is in, as Linux shows them. Knows where their files are, not what they mean. */
import { readFileSync } from "node:fs";

/** The text of a file, null where there is none. */
export type Read = (path: string) => string | null;

export interface Groups {
  readonly version: 1 | 2;
  /** Folders of the group and of those around it, innermost first. A container may see the outermost alone. */
  readonly folders: readonly string[];
}

/**
 * The groups that bind this process for a controller, such as `memory`; null where none is mounted at the usual place.
 * Where version 1 has the controller, version 2 does not.
 */
export function groupsOf(controller: string, read: Read): Groups | null {
  const lines = (read("/proc/self/cgroup") ?? "").split("\n").map((line) => /^(\d+):([^:]*):(.*)$/.exec(line));
  const first = lines.find((m) => m?.[2].split(",").includes(controller));
  if (first) return { version: 1, folders: upward(`/sys/fs/cgroup/${controller}`, first[3]) };
  const second = lines.find((m) => m?.[1] === "0" && m[2] === "");
  return second ? { version: 2, folders: upward("/sys/fs/cgroup", second[3]) } : null;
}

function upward(root: string, path: string): string[] {
  const names = path.split("/").filter((name) => name !== "" && name !== ".."); // a namespace may begin below the group
  return [...names.keys(), names.length].reverse().map((n) => [root, ...names.slice(0, n)].join("/"));
}

export function readText(path: string): string | null {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return null; // another system, or a sandbox that hides it
  }
}
