/**
 * A lock between processes: a symbolic link beside the locked file, whose target names its holder. Creating a link is atomic, and the
 * link is complete from its first moment. Only its holder removes it, or, once the holder has provably died, one successor. Knows
 * nothing of what it protects.
 */
import { randomBytes } from "node:crypto";
import { readFile, readlink, rm, symlink, unlink } from "node:fs/promises";
import { hostname } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";

/** A lock stayed taken; the message says by whom and what to do. */
export class LockError extends Error {
  override readonly name = "LockError";
}

/** Longest wait. Holders need milliseconds, but a hundred may be waiting. */
const PATIENCE_MS = 60_000;

/** Runs `act` while holding the lock. Rejects with LockError, with a system error if the folder can't be written, or as `act` does. */
export async function withLock<T>(lock: string, act: () => Promise<T>, patienceMs = PATIENCE_MS): Promise<T> {
  const me = await identity();
  const deadline = performance.now() + patienceMs;
  while (!(await claim(lock, me))) {
    const holder = await holderOf(lock);
    if (holder === null) continue;
    if (await isDead(holder)) await bury(lock, holder, me);
    else if (performance.now() > deadline)
      throw new LockError(`${lock} is held by process ${holder.split(":")[1] ?? "?"}; if that no longer runs, delete this file`);
    else await sleep(5 + Math.random() * 20);
  }
  try {
    return await act();
  } finally {
    await rm(lock, { force: true });
  }
}

/** `where:pid:started:random`. `where` is the machine since its start and the process table that the pid belongs to. */
async function identity(): Promise<string> {
  const boot = await readFile("/proc/sys/kernel/random/boot_id", "utf8").catch(() => hostname());
  const table = await readlink("/proc/self/ns/pid").catch(() => "pid");
  const where = `${boot.trim()}.${table}`.replaceAll(":", "");
  return [where, process.pid, await startOf(process.pid), randomBytes(8).toString("hex")].join(":");
}

/** Tells a process from a later one with the same id. Empty where there is no /proc, or no such process. */
async function startOf(pid: number): Promise<string> {
  const stat = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => "");
  return stat.slice(stat.lastIndexOf(")") + 2).split(" ")[19] ?? "";
}

async function claim(lock: string, me: string): Promise<boolean> {
  try {
    await symlink(me, lock);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EEXIST") return false;
    throw error;
  }
}

async function holderOf(lock: string): Promise<string | null> {
  try {
    return await readlink(lock);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT") return null;
    if (code === "EINVAL") return "?"; // some other file of this name
    throw error;
  }
}

/** Only what is certain: a holder on another machine or in another container may be alive. */
async function isDead(holder: string): Promise<boolean> {
  const [where, pid, started] = holder.split(":");
  if (where !== (await identity()).split(":")[0]) return false;
  try {
    process.kill(Number(pid), 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "ESRCH";
  }
  return started !== "" && started !== (await startOf(Number(pid)));
}

/**
 * Removes the lock of a dead holder. Several may find it dead, and a slow one must not remove the lock of whoever comes next. So the
 * right to remove is itself claimed, under the holder's unique name, and the lock is read again after that.
 */
async function bury(lock: string, holder: string, me: string): Promise<void> {
  const right = `${lock}.${holder.split(":")[3] ?? "?"}`;
  if (!(await claim(right, me))) {
    const heir = await holderOf(right);
    if (heir !== null && (await isDead(heir)))
      throw new LockError(`a process died while it removed a stale lock; delete ${lock} and ${right}`);
    await sleep(5);
    return;
  }
  try {
    if ((await holderOf(lock)) === holder) await unlink(lock);
  } finally {
    await unlink(right);
  }
}
