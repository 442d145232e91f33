/** How the page is built: into dist/web, every asset a file of its own, since the page's policy allows nothing inline. */
import { defineConfig } from "vite";

export default defineConfig({
  root: import.meta.dirname,
  base: "./",
  // A development server asks the real one: `mixtape serve` beside `npx vite --config src/web/vite.config.ts`.
  server: { proxy: Object.fromEntries(["/v1", "/health", "/ready", "/metrics"].map((path) => [path, "http://127.0.0.1:8080"])) },
  build: {
    outDir: "../../dist/web",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2023",
    reportCompressedSize: false,
  },
});
