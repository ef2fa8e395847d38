// A form made from a kind's schema, sent as JSON. What is wrong is said at its field.
import { reason, send } from "./app.js";

const form = document.querySelector("#job");
const uploads = new Map(); // field -> promise of a file's id

// The same for every try of this form: a second click, or a try after a lost answer, makes no second job.
let key = newKey();
function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const row = (name) => form.querySelector(`.field[data-for="${CSS.escape(name)}"]`);

function complain(name, text) {
  const found = row(name);
  const line = found?.querySelector(".wrong") ?? form.querySelector("#wrong");
  line.textContent = text;
  line.hidden = !text;
  found?.querySelector("input, select, textarea")?.setAttribute("aria-invalid", Boolean(text));
  if (found && text) found.closest("details")?.setAttribute("open", "");
}

// --- files ---------------------------------------------------------------------------------------------------------

function upload(input, file) {
  const drop = input.closest(".drop");
  const bar = drop.querySelector("progress");
  drop.querySelector(".picked").textContent = file.name;
  complain(input.dataset.field, "");
  bar.hidden = false;
  bar.value = 0;
  const body = new FormData();
  body.append("file", file);
  // Not fetch, which does not tell how far it is.
  const request = new XMLHttpRequest();
  const sent = new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => (bar.value = event.loaded / event.total);
    request.onload = () => {
      const answer = request.response ?? {};
      if (request.status === 201) resolve(answer.id);
      else reject(answer);
    };
    request.onerror = () => reject({});
  });
  request.open("POST", "/api/files");
  request.responseType = "json";
  request.send(body);
  uploads.get(input.dataset.field)?.request.abort();
  uploads.set(input.dataset.field, { request, sent });
  sent.then(
    () => drop.classList.add("done"),
    (error) => {
      complain(input.dataset.field, reason(error));
      uploads.delete(input.dataset.field);
    },
  );
}

for (const input of form.querySelectorAll("input[type=file]")) {
  const drop = input.closest(".drop");
  input.addEventListener("change", () => input.files[0] && upload(input, input.files[0]));
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files[0]) upload(input, event.dataTransfer.files[0]);
    });
  }
}

// --- the body ------------------------------------------------------------------------------------------------------

// What the field holds; undefined leaves it out.
async function read(input, chosen) {
  const { widget, field } = input.dataset;
  if (widget === "file") {
    const found = uploads.get(field);
    if (!found && (input.required || chosen)) throw "Choose a file.";
    return found && (await found.sent.catch(() => Promise.reject("The upload failed. Choose the file again.")));
  }
  if (widget === "switch") return input.checked;
  if (!input.validity.valid) throw input.validationMessage;
  const text = input.value;
  if (widget === "text" && (chosen || input.required)) return text;
  if (text.trim() === "") return undefined;
  if (widget === "number") return Number(text);
  if (widget === "json") {
    try {
      return JSON.parse(text);
    } catch (error) {
      throw `This is no JSON. ${error.message}`;
    }
  }
  return text;
}

async function body() {
  const payload = {};
  let fine = true;
  const chosen = form.querySelector("input[name=one-of]:checked")?.value;
  const alternatives = [...form.querySelectorAll("input[name=one-of]")].map((radio) => radio.value);
  for (const input of form.querySelectorAll("[data-field]")) {
    const name = input.dataset.field;
    if (alternatives.includes(name) && name !== chosen) continue;
    try {
      const value = await read(input, name === chosen);
      if (value !== undefined) payload[name] = value;
    } catch (text) {
      complain(name, text);
      fine = false;
    }
  }
  const options = {};
  for (const input of form.querySelectorAll("[data-option]")) {
    const { option } = input.dataset;
    if (!input.validity.valid) {
      complain(option, input.validationMessage);
      fine = false;
    } else if (input.value) {
      if (input.type === "number") options[option] = Number(input.value);
      else options[option] = input.type === "datetime-local" ? new Date(input.value).toISOString() : input.value;
    }
  }
  return fine && { kind: form.dataset.kind, payload, ...options };
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button.primary");
  for (const found of form.querySelectorAll(".field")) complain(found.dataset.for, "");
  complain("", "");
  button.disabled = true;
  try {
    const job = await body();
    if (job) {
      const { id } = await send("POST", "/api/jobs", job, { "Idempotency-Key": key });
      return location.assign(`/jobs/${id}`);
    }
  } catch (error) {
    if (error.errors) {
      for (const { field, message } of error.errors) {
        // body.thumbnail.payload.width, body.thumbnail.run_at; where there is one kind, without its name
        const path = field.split(".");
        const payload = path.indexOf("payload");
        complain((payload < 0 ? path.at(-1) : path[payload + 1]) ?? "", message);
      }
    } else {
      complain("", reason(error));
    }
    if (error.status) key = newKey(); // an answer: the next try may have another body
  }
  button.disabled = false;
  form.querySelector("[aria-invalid=true]")?.focus();
});
