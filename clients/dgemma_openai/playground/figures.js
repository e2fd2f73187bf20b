// The counts under an answer. Knows no page.

/** [name, text] of each; `steps` are the previews seen, times in milliseconds. */
export function figures(usage, steps, totalMs, firstCanvasMs, reason) {
  const canvases = Math.max(0, ...steps.map(({ canvas }) => canvas + 1));
  const cached = usage.prompt_tokens_details.cached_tokens;
  const prompt = `${count(usage.prompt_tokens)} tokens${cached ? `, ${count(cached)} of them cached` : ""}`;
  const found = [
    ["Prompt", prompt],
    ["Answer", `${count(usage.completion_tokens)} tokens`],
    ["Speed", `${count((1000 * usage.completion_tokens) / totalMs)} tokens/s`],
    ["Steps", count(usage.denoising_steps)],
  ];
  if (canvases) {
    found.push(["Canvases", count(canvases)], ["Steps per canvas", count(usage.denoising_steps / canvases)]);
  }
  if (firstCanvasMs !== null) found.push(["First canvas", `${count(firstCanvasMs)} ms`]);
  return [...found, ["In all", `${count(totalMs)} ms`], ["Ended by", reason]];
}

function count(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
}
