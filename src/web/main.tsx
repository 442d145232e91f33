/** Starts the page. */
import { render } from "preact";
import { App } from "./app.tsx";
import { Client } from "./client.ts";
import { Library } from "./library.ts";
import { applyPreferences, readPreferences } from "./preferences.ts";
import { Session } from "./session.ts";
import "./style/base.css";
import "./style/layout.css";
import "./style/chat.css";
import "./style/panels.css";
import { Vault } from "./vault.ts";

const preferences = readPreferences();
applyPreferences(preferences); // before the first render, so that the theme does not flash

const vault = new Vault();
const client = new Client(vault, new URL("./", document.baseURI).href);
const session = new Session(client, new Library());
render(<App session={session} client={client} vault={vault} preferences={preferences} />, document.getElementById("page") as HTMLElement);
