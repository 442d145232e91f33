/** `mixtape serve`: runs a server in the foreground, from settings to shutdown. Knows no route. */
import type { Command } from "commander";
import type { ServeConfig } from "../server/config.ts";
import type { Server } from "../server/server.ts";
import { surviveBrokenOutput } from "./failure.ts";
import { DEMO } from "./models.ts";
import { examples } from "./options.ts";
import type { ServeFlags } from "./settings.ts";
import { colours, notice, warn } from "./terminal.ts";

export async function addServe(program: Command): Promise<void> {
  const command = program.command("serve").description("Serve models to many users: OpenAI's API over HTTP, gRPC, and a web page.");
  // Flags are derived from the settings' schema; other commands need not load its library.
  if (process.argv.includes("serve")) (await import("./settings.ts")).addSettings(command);
  command
    .addHelpText(
      "after",
      examples(
        ["mixtape serve", "the bundled model, on http://127.0.0.1:8080"],
        ["mixtape serve -m baidu/ERNIE-4.5-21B-A3B-PT --dtype int4", "another model"],
        ["mixtape serve -m small=default -m big=/models/21b", "two models, by name"],
        ["mixtape serve -m shop=default --adapter polite=runs/polite", "a model with an adapter, shop:polite"],
        ["mixtape serve --host 0.0.0.0 --keys keys.json", "for others, with API keys ('mixtape keys create')"],
        ["mixtape serve --config server.yaml", "settings from a file"],
      ),
    )
    .action(serve);
}

async function serve(flags: ServeFlags): Promise<void> {
  if (flags.printConfigSchema) {
    const { configJsonSchema } = await import("../server/config.ts");
    process.stdout.write(`${JSON.stringify(configJsonSchema(), null, 2)}\n`);
    return;
  }
  const [{ settings }, { createServer }, { isBundled }] = await Promise.all([
    import("./settings.ts"),
    import("../server/server.ts"),
    import("../api/find.ts"),
  ]);
  const config = await settings(flags);
  surviveBrokenOutput(); // losing the log or the terminal must not end the service
  const server = await createServer(config);
  const ended = untilSignalled(server);
  announce(config, await server.start());
  if (config.models.some(({ path }) => isBundled(path))) warn(DEMO);
  await ended;
  process.exit(); // log lines that nobody reads would keep the process alive
}

/** Prints the addresses to standard error, since standard output is the log. */
function announce(config: ServeConfig, { url, grpcPort }: Awaited<ReturnType<Server["start"]>>): void {
  const { bold } = colours(process.stderr);
  const names = config.models.flatMap(({ name, adapters }) => [name, ...Object.keys(adapters).map((each) => `${name}:${each}`)]).join(", ");
  const keys = config.keys === undefined ? "no API key required" : "API key required";
  const grpc = grpcPort === null ? "" : `; gRPC on port ${grpcPort}`;
  notice(`mixtape serves ${names} at ${bold(url)} (${keys}); API at ${url}/v1${config.docs ? `, described at ${url}/docs` : ""}${grpc}`);
}

/** Resolves when the server has shut down. The first SIGTERM or Ctrl-C drains running requests, the second exits immediately. */
function untilSignalled(server: Server): Promise<void> {
  return new Promise((resolve, reject) => {
    let leaving = false;
    const leave = () => {
      if (leaving) process.exit(1);
      leaving = true;
      server.stop().then(resolve, reject);
    };
    process.on("SIGTERM", leave).on("SIGINT", leave).on("SIGHUP", server.reload);
  });
}
