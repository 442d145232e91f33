/** Markdown to safe HTML: no HTML of the text's own, no pictures from elsewhere, links that tell nothing. */
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import c from "highlight.js/lib/languages/c";
import css from "highlight.js/lib/languages/css";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import MarkdownIt from "markdown-it";

for (const [name, language] of Object.entries({ bash, c, css, javascript, json, python, sql, typescript, xml }))
  hljs.registerLanguage(name, language);

const parser = new MarkdownIt({
  html: false,
  linkify: true,
  highlight: (code, name) => (hljs.getLanguage(name) ? hljs.highlight(code, { language: name }).value : ""),
});
parser.disable("image");
parser.renderer.rules["link_open"] = (tokens, i, options, _env, self) => {
  tokens[i].attrSet("rel", "noopener noreferrer nofollow");
  tokens[i].attrSet("target", "_blank");
  return self.renderToken(tokens, i, options);
};

export function markdown(text: string): string {
  return DOMPurify.sanitize(parser.render(text), {
    ADD_ATTR: ["target"],
    FORBID_TAGS: ["img", "style", "form", "input"],
    FORBID_ATTR: ["style"],
  });
}
