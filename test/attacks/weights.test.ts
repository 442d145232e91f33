/** Weights files that go away or change while they are mapped, and weights that are not numbers: the error names them, and everything else goes on. */
import { execFile } from "node:child_process";
import { cpSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { temporary } from "../cli/run.ts";
import { GOLDENS } from "../goldens.ts";

const root = fileURLToPath(new URL("../..", import.meta.url));

/** A copy of a model that may be damaged. */
function copied(model: string): string {
  const folder = temporary();
  cpSync(model, folder, { recursive: true });
  return folder;
}

describe("a file of weights in use", () => {
  interface Said {
    readonly tokens: number;
    readonly during: string | null;
    readonly after: string | null;
    readonly lost: readonly boolean[];
    readonly served: boolean;
    readonly again: string;
  }
  async function happens(what: string, folder = copied(`${GOLDENS}moe-tiny`)): Promise<Said> {
    const script = fileURLToPath(new URL("./weights.child.ts", import.meta.url));
    const { stdout } = await promisify(execFile)(
      process.execPath,
      ["--import", "tsx", script, what, folder, copied(`${GOLDENS}dense-tiny`)],
      {
        cwd: root,
      },
    );
    return JSON.parse(stdout) as Said;
  }

  test.each([
    ["truncate", /model\.safetensors: .*rename it into place$/, /truncated or damaged/],
    ["empty", /model\.safetensors: .*rename it into place$/, /truncated: 0 bytes/],
    ["copy over", /model\.safetensors: .*rename it into place$/, /./],
    ["touch", /model\.safetensors: was changed while the model was in use/, /^served$/],
  ])("%s: its requests fail with the file's name, the process lives, another model goes on", async (what, message, again) => {
    const said = await happens(what);
    expect(said.tokens).toBeGreaterThanOrEqual(8);
    expect(said.tokens).toBeLessThan(60);
    expect(said.during).toMatch(message);
    expect(said.after).toBe(said.during);
    expect({ lost: said.lost, served: said.served }).toEqual({ lost: [true, false], served: true });
    expect(said.again).toMatch(again);
  });

  test("truncated in the middle of a step", async () => {
    const said = await happens("truncate within a step", copied(join(root, "models/small-moe")));
    expect(said.during).toMatch(/model\.safetensors: cannot be read any more: it was truncated or its disk failed .*rename it into place$/);
    expect(said).toMatchObject({ tokens: 0, after: said.during, lost: [true, false], served: true });
  });

  test("renamed into place: the loaded model goes on with what it was loaded from", async () => {
    expect(await happens("rename")).toMatchObject({ tokens: 60, during: null, after: null, lost: [false, false], served: true });
  });
});
