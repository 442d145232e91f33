/** Builds the page into dist/web, which `mixtape serve` hands out. Nothing in it comes from elsewhere. */
import preact from "@preact/preset-vite";
import { defineConfig } from "vite";

export default defineConfig({
  root: import.meta.dirname,
  base: "./",
  plugins: [preact({ devToolsEnabled: false })],
  logLevel: "warn",
  build: { outDir: "../../dist/web", emptyOutDir: true, modulePreload: { polyfill: false }, assetsInlineLimit: 0 },
});
