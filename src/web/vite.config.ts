/** The build of the page: into dist/web, every asset in its own file, since the page's Content-Security-Policy allows nothing inline. */
import { defineConfig } from "vite";

export default defineConfig({
  root: import.meta.dirname,
  base: "./",
  // The development server proxies the API to `mixtape serve`; start it with `npx vite --config src/web/vite.config.ts`.
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
