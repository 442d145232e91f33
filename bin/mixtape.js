#!/usr/bin/env node
// Says which Node is too old before anything that such a Node could not load.
if (process.features.require_module) await import("../dist/cli/main.js");
else {
  process.stderr.write(
    `mixtape: Node ${process.versions.node} is too old: 22.12 or later is needed (20.19 or later of version 20 works, too)\n`,
  );
  process.exitCode = 1;
}
