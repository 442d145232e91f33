/** Which parts of a grammar can never be completed, because every way through them leads back into them or nowhere. */
import type { Expression } from "./expression.ts";
import type { Steps } from "./work.ts";

/** Parts that are looked at between two pauses. */
const SLICE = 10_000;

/** The parts of a grammar that no finite text matches. A part of them must not be entered. */
export function* deadParts(grammar: Expression): Steps<ReadonlySet<Expression>> {
  let parts = 0;
  const users = new Map<Expression, Expression[]>();
  /** How many parts of a sequence are not known to be completable yet. */
  const missing = new Map<Expression, number>();
  const reached = [grammar];
  const live: Expression[] = [];
  const waiting = new Set<Expression>(reached);
  for (let e = reached.pop(); e !== undefined; e = reached.pop()) {
    const within = partsOf(e);
    if ((parts += 1 + within.length) % SLICE < 1 + within.length) yield;
    missing.set(e, e.kind === "sequence" ? within.length : 1);
    if (e.kind === "sequence" ? within.length === 0 : isComplete(e)) live.push(e);
    for (const part of within) {
      (users.get(part) ?? users.set(part, []).get(part))?.push(e);
      if (waiting.has(part)) continue;
      waiting.add(part);
      reached.push(part);
    }
  }
  for (let e = live.pop(); e !== undefined; e = live.pop()) {
    if (!waiting.delete(e)) continue;
    if (++parts % SLICE === 0) yield;
    for (const user of users.get(e) ?? []) {
      const left = (missing.get(user) ?? 1) - 1;
      missing.set(user, left);
      if (user.kind !== "sequence" || left === 0) live.push(user);
    }
  }
  return waiting;
}

function partsOf(e: Expression): readonly Expression[] {
  switch (e.kind) {
    case "sequence":
    case "choice":
      return e.items;
    case "repeat":
      return [e.item];
    case "rule":
      return e.to === null ? [] : [e.to];
    case "bytes":
    case "byte":
    case "token":
    case "text":
    case "until":
      return [];
    default:
      return e satisfies never;
  }
}

function isComplete(e: Expression): boolean {
  return e.kind === "repeat" ? e.min === 0 : !["sequence", "choice", "rule"].includes(e.kind);
}
