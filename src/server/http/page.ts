/** Serves the built web page. Browsers cache files with hashed names forever and revalidate the page itself. Knows no API. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import fastifyStatic from "@fastify/static";
import type { FastifyInstance } from "fastify";

/** Where the build puts the page; the path is the same from src/ and from dist/. */
const PAGE = fileURLToPath(new URL("../../../dist/web", import.meta.url));

/** Serves the page at /. Resolves with false, serving nothing, when it is not built. */
export async function registerPage(app: FastifyInstance, folder = PAGE): Promise<boolean> {
  if (!existsSync(join(folder, "index.html"))) return false;
  await app.register(fastifyStatic, {
    root: folder,
    // One route per existing file, so no path can reach another file.
    wildcard: false,
    globIgnore: ["**/*.map"],
    cacheControl: false,
    setHeaders: (response, path) => {
      const hashed = path.startsWith(join(folder, "assets"));
      response.header("cache-control", hashed ? "public, max-age=31536000, immutable" : "no-cache");
    },
  });
  return true;
}
