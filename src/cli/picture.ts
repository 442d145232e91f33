/** Converts SVG to PNG with this machine's fonts. Reports characters they lack, which would otherwise silently become boxes or gaps. */
import { existsSync } from "node:fs";
import type { Resvg, ResvgRenderOptions } from "@resvg/resvg-js";
import { UsageError } from "./failure.ts";
import { escapeXml, FONT_FAMILIES } from "./heatmap.ts";

export interface Picture {
  readonly png: Buffer;
  /** Characters of the text that no available font has. */
  readonly missing: readonly string[];
}

type Fonts = NonNullable<ResvgRenderOptions["font"]>;
type Renderer = typeof Resvg;

/** Renders `svg`, `width` pixels wide. `text`: the characters that it must show. `font`: a font file to use instead of the system's. */
export async function drawPng(svg: string, text: string, { width = 2560, font }: { width?: number; font?: string } = {}): Promise<Picture> {
  const { Resvg } = await import("@resvg/resvg-js").catch((cause: unknown) => {
    throw new UsageError("PNG needs the package @resvg/resvg-js, which has no build for this machine; use --svg", { cause });
  });
  if (font !== undefined && !existsSync(font)) throw new UsageError(`${font}: no such font file`);
  const fonts: Fonts = font ? { loadSystemFonts: false, fontFiles: [font] } : systemFonts(Resvg);
  const png = new Resvg(svg, { fitTo: { mode: "width", value: width }, font: fonts }).render().asPng();
  const characters = [...new Set(text)].filter((c) => /[^\s\p{Cf}\p{Mn}]/u.test(c));
  // A private character that fonts do not have, drawn last, shows what a missing one looks like: a box, or nothing.
  const tiles = drawTiles(
    Resvg,
    fonts,
    [...characters, "\u{10fffd}"].map((c) => ({ text: c })),
  );
  const lacking = tiles.at(-1);
  return { png, missing: characters.filter((_, i) => lacking !== undefined && tiles[i].equals(lacking)) };
}

/** resvg looks only for the first family of a list, so this finds the first one that is installed. */
function systemFonts(Renderer: Renderer): Fonts {
  const fonts: Fonts = { loadSystemFonts: true };
  const tiles = drawTiles(
    Renderer,
    fonts,
    [...FONT_FAMILIES, "no such family"].map((family) => ({ text: "a", family })),
  );
  const none = tiles.at(-1);
  const found = FONT_FAMILIES.find((_, i) => none !== undefined && !tiles[i].equals(none));
  return found ? { ...fonts, defaultFontFamily: found, sansSerifFamily: found } : fonts;
}

const TILE = 24;

/** The pixels of several short texts, rendered together, since every rendering loads all fonts again. */
function drawTiles(Renderer: Renderer, font: Fonts, texts: readonly { text: string; family?: string }[]): Buffer[] {
  const drawn = texts.map(({ text, family = "sans-serif" }, i) => {
    return `<text x="2" y="${i * TILE + 18}" font-size="15" font-family="${family}">${escapeXml(text)}</text>`;
  });
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${TILE}" height="${texts.length * TILE}">${drawn.join("")}</svg>`;
  const { pixels } = new Renderer(svg, { font }).render();
  const size = TILE * TILE * 4;
  return texts.map((_, i) => pixels.subarray(i * size, (i + 1) * size));
}
