// `routing`: its JSON, pictures and terminal views; and the parts that draw.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { countExperts, type LayerUse } from "../../src/cli/census.ts";
import { layerGrid } from "../../src/cli/grid.ts";
import { escapeXml, heatmapSvg } from "../../src/cli/heatmap.ts";
import { displayWidth, excerpt } from "../../src/cli/terminal.ts";
import { run, temporary, tinyModel } from "./run.ts";

interface Json {
  layers: LayerUse[];
  tokens: { id: number; text: string; prompt: boolean; layers: { experts: number[]; weights: number[] }[] }[];
  prompt_tokens: number;
}

test("JSON: loads sum to 1, and tokens agree with the counts", async () => {
  const { code, out } = await run(["routing", "中文 abc", "-m", tinyModel(), "--generate", "4", "--json"]);
  expect(code).toBe(0);
  const { layers, tokens, prompt_tokens } = JSON.parse(out) as Json;
  expect(layers.map((l) => l.layer)).toEqual([1, 2, 3]);
  expect(tokens.slice(0, 4).map((t) => t.text)).toEqual(["中", "文", " ", "a"]);
  expect(tokens.filter((t) => t.prompt)).toHaveLength(prompt_tokens);
  expect(tokens).toHaveLength(prompt_tokens + 4);
  for (const [i, l] of layers.entries()) {
    expect(l.load.reduce((a, b) => a + b)).toBeCloseTo(1, 12);
    const counts = new Array<number>(8).fill(0);
    for (const token of tokens) for (const e of token.layers[i].experts) counts[e]++;
    expect(counts).toEqual(l.counts);
    for (const token of tokens) expect(token.layers[i].weights.reduce((a, b) => a + b)).toBeCloseTo(1, 4);
  }
});

test("terminal views fit the width and need no colours", async () => {
  const model = tinyModel();
  for (const args of [
    ["routing", "中文 abc"],
    ["routing", "中文 abc", "--tokens", "--layer", "2"],
    ["routing", "--ids", "5,6"],
  ]) {
    const { code, out } = await run([...args, "-m", model], { env: { COLUMNS: "80" } });
    expect(code).toBe(0);
    expect(out).not.toContain("\x1b");
    expect(Math.max(...out.split("\n").map(displayWidth))).toBeLessThanOrEqual(80);
  }
  const coloured = await run(["routing", "abc", "-m", model], { env: { FORCE_COLOR: "1" } });
  expect(coloured.out).toContain("\x1b[48;2;");
  const { code, err } = await run(["routing", "abc", "--tokens", "--layer", "0", "-m", model]);
  expect([code, err]).toEqual([1, "mixtape: layer 0 has no experts; those with experts are 1, 2, 3\n"]);
});

test("writes SVG and PNG", async () => {
  const folder = temporary();
  const [svg, png] = [join(folder, "a.svg"), join(folder, "a.png")];
  const { code } = await run(["routing", 'a <b> & "中文"', "-m", tinyModel(), "--svg", svg, "--png", png]);
  expect(code).toBe(0);
  const text = readFileSync(svg, "utf8");
  expectWellFormed(text);
  expect(text).toContain("a &lt;b&gt; &amp; &quot;中文&quot;");
  const bytes = readFileSync(png);
  expect(bytes.subarray(1, 4).toString()).toBe("PNG");
  expect(bytes.readUInt32BE(16)).toBe(2560);
});

test("the SVG of the largest mixture is well-formed and references nothing external", () => {
  const svg = heatmapSvg(uses(27, 64), { title: "T\u0000\ud800 'x'", model: "m", prompt: "]]>", tokens: 100, chosen: 6 });
  expectWellFormed(svg);
  expect(svg.match(/<rect [^>]*><title>layer/g)).toHaveLength(27 * 64 + 27);
  expect(svg.replace('xmlns="http://www.w3.org/2000/svg"', "")).not.toMatch(/href|https?:|url\((?!#)/);
});

test("64 experts in 27 layers fit 80 columns; 50 cut them into bands", () => {
  for (const width of [50, 80, 120, 250]) {
    const lines = layerGrid(uses(27, 64), { width, shading: "blocks" });
    expect(Math.max(...lines.slice(0, 27).map(displayWidth))).toBeLessThanOrEqual(width);
    expect(lines.filter((line) => /^ +27 /.test(line))).toHaveLength(width < 70 ? 2 : 1);
  }
});

test("balance: even use, and all in one", () => {
  const dims = [4, 1];
  const layer = (experts: number[]) => {
    const weights = { dims, data: new Float32Array(4).fill(0.5) };
    return { layer: 0, logits: { dims: [4, 4], data: new Float32Array(16) }, experts: { dims, data: Int32Array.from(experts) }, weights };
  };
  const [even, one] = countExperts([layer([0, 1, 2, 3]), layer([2, 2, 2, 2])], 4);
  expect(even).toMatchObject({ variation: 0, max_load: 0.25, entropy: 2, effective_experts: 4, unused_experts: 0 });
  expect(one).toMatchObject({ max_load: 1, effective_experts: 1, unused_experts: 3, mean_weights: [0, 0, 0.5, 0] });
});

test("texts are escaped, and cut by their width on the screen", () => {
  expect(escapeXml(`<a b="c">&'\u0001\ud800`)).toBe("&lt;a b=&quot;c&quot;&gt;&amp;&#39;\ufffd\ufffd");
  expect(displayWidth("中文ab")).toBe(6);
  expect(excerpt("中文中文\nab", 7)).toBe("中文中…");
});

function uses(layers: number, experts: number): LayerUse[] {
  const tokens = 100;
  const outputs = Array.from({ length: layers }, (_, i) => ({
    layer: i + 1,
    logits: { dims: [tokens, experts], data: new Float32Array(0) },
    experts: { dims: [tokens, 6], data: Int32Array.from({ length: tokens * 6 }, (_, j) => ((j * j) % (17 + i)) % experts) },
    weights: { dims: [tokens, 6], data: new Float32Array(tokens * 6).fill(1 / 6) },
  }));
  return countExperts(outputs, experts);
}

/** Checks that tags close in order, attributes are quoted, and no unescaped markup remains. */
function expectWellFormed(xml: string): void {
  const open: string[] = [];
  const rest = xml.replace(
    /<(\/?)([\w:]+)((?:\s+[\w:-]+="[^"<]*")*)\s*(\/?)>/g,
    (_, close: string, name: string, _attributes, empty: string) => {
      if (close) expect(open.pop()).toBe(name);
      else if (!empty) open.push(name);
      return "";
    },
  );
  expect(open).toEqual([]);
  expect(rest).not.toMatch(/[<]|&(?!(amp|lt|gt|quot|#39);)|[\u0000-\u0008\u000b\u000c\u000e-\u001f]/);
}
