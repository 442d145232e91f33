/** The web page's files, built beforehand. Hashed names are kept by browsers for good, the page itself is asked for each time. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import fastifyStatic from "@fastify/static";
import type { FastifyInstance } from "fastify";

/** Where the build puts it; the same from src/ and from dist/. */
const PAGE = fileURLToPath(new URL("../../../dist/web", import.meta.url));

/** Serves the page at /. False, and nothing served, when it is not built. */
export async function registerPage(app: FastifyInstance, folder = PAGE): Promise<boolean> {
  if (!existsSync(join(folder, "index.html"))) return false;
  await app.register(fastifyStatic, {
    root: folder,
    // A route for each file that is there: a path can name no other.
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
