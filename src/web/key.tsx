/** The form for the API key, shown when the server requires one. */
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { Icon } from "./icons.tsx";
import { usePage } from "./page.ts";

export function KeyForm() {
  const { say, session, vault } = usePage();
  const id = useId();
  const field = useRef<HTMLInputElement>(null);
  const [key, setKey] = useState("");
  const [keep, setKeep] = useState(vault.kept);
  const [refused, setRefused] = useState(vault.key !== "");
  useEffect(() => field.current?.focus(), []);
  return (
    <form
      class="notice key-form"
      aria-labelledby={`${id}-title`}
      onSubmit={(event) => {
        event.preventDefault();
        vault.set(key, keep);
        void session.connect().then(() => setRefused(session.view.connection === "key"));
      }}
    >
      <h2 id={`${id}-title`}>
        <Icon name="key" /> {say("keyNeeded")}
      </h2>
      <p id={`${id}-hint`} role={refused ? "alert" : undefined} class={refused ? "bad" : "quiet-text"}>
        {say(refused ? "keyRefused" : "keyHint")}
      </p>
      <label for={`${id}-key`}>{say("key")}</label>
      <div class="row">
        <input
          ref={field}
          id={`${id}-key`}
          type="password"
          autocomplete="off"
          spellcheck={false}
          required
          aria-describedby={`${id}-hint`}
          value={key}
          onInput={(event) => setKey(event.currentTarget.value)}
        />
        <button type="submit" class="primary">
          {say("keyUse")}
        </button>
      </div>
      <label class="check">
        <input type="checkbox" checked={keep} onChange={(event) => setKeep(event.currentTarget.checked)} />
        {say("keyKeep")}
      </label>
    </form>
  );
}
