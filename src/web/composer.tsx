/** The message field, and the buttons that send a message and stop an answer. */
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon } from "./icons.tsx";
import { usePage } from "./page.ts";

export interface ComposerParts {
  readonly running: boolean;
  readonly onSend: (text: string) => void;
  readonly onStop: () => void;
}

export function Composer({ running, onSend, onStop }: ComposerParts) {
  const { say } = usePage();
  const [text, setText] = useState("");
  const field = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    // Only on devices with a pointer: on touch screens, focus would open the on-screen keyboard.
    if (matchMedia("(hover: hover)").matches && document.activeElement === document.body) field.current?.focus();
  }, []);
  useLayoutEffect(() => fitHeight(field.current), [text]);

  function send(): void {
    if (running || text.trim() === "") return;
    onSend(text);
    setText("");
  }

  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
        field.current?.focus();
      }}
    >
      <div class="composer-box">
        <textarea
          ref={field}
          id="message"
          rows={1}
          aria-label={say("message")}
          aria-describedby="composer-hint"
          placeholder={say("messagePlaceholder")}
          value={text}
          onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            send();
          }}
        />
        {running ? (
          <button type="button" class="primary square round" aria-label={say("stop")} title={say("stop")} onClick={onStop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button
            type="submit"
            class="primary square round"
            aria-label={say("send")}
            title={say("send")}
            aria-disabled={text.trim() === ""}
          >
            <Icon name="send" />
          </button>
        )}
      </div>
      <p id="composer-hint" class="hint">
        {say(running ? "stopHint" : "composerHint")}
      </p>
    </form>
  );
}

/** Grows the field with its text, up to the height that the style sheet allows. */
export function fitHeight(field: HTMLTextAreaElement | null): void {
  if (!field) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}
