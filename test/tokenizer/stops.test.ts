import fc from "fast-check";
import { expect, test } from "vitest";
import { StopStrings } from "../../src/tokenizer/stops.ts";

/** All of the text that comes through, in these pieces. */
function through(stops: readonly string[], pieces: readonly string[]): { text: string; stopped: boolean } {
  const watch = new StopStrings(stops);
  let [text, stopped] = ["", false];
  for (const piece of pieces) {
    const watched = watch.push(piece);
    text += watched.text;
    stopped = watched.stopped;
  }
  return { text: text + watch.finish(), stopped };
}

test("text before the first stop string comes through, however it is cut", () => {
  const small = fc.string({ unit: fc.constantFrom("a", "b", "c", "中"), maxLength: 30 });
  fc.assert(
    fc.property(
      small,
      fc.array(fc.string({ unit: fc.constantFrom("a", "b", "c", "中"), minLength: 1, maxLength: 4 }), { maxLength: 3 }),
      fc.array(fc.nat(30)),
      (text, stops, cuts) => {
        const at = [0, ...cuts.map((c) => Math.min(c, text.length)).sort((a, b) => a - b), text.length];
        const pieces = at.slice(1).map((end, i) => text.slice(at[i], end));
        const found = stops.map((s) => text.indexOf(s)).filter((i) => i >= 0);
        expect(through(stops, pieces).stopped).toBe(found.length > 0);
        // Where stops overlap, the one that is complete first decides; whatever comes through is before it.
        const { text: out } = through(stops, pieces);
        if (found.length === 0) expect(out).toBe(text);
        else expect(text.startsWith(out) && stops.every((s) => !out.includes(s))).toBe(true);
        if (stops.length === 1 && found.length > 0) expect(out).toBe(text.slice(0, found[0]));
      },
    ),
  );
});

test("nothing is held back that cannot become a stop string", () => {
  const watch = new StopStrings(["\nUser:"]);
  expect(watch.push("Hello\n")).toEqual({ text: "Hello", stopped: false });
  expect(watch.push("world")).toEqual({ text: "\nworld", stopped: false });
  expect(watch.push("!\nUse")).toEqual({ text: "!", stopped: false });
  expect(watch.push("r: me")).toEqual({ text: "", stopped: true });
  expect(watch.finish()).toBe("");
});
