// Puts the parts that the daemon rendered in their places, as they change. Without this the page is a still picture.
"use strict";

const link = document.getElementById("link");
const stream = new EventSource("/api/v1/events?parts");

stream.addEventListener("open", () => { link.textContent = "live"; });
stream.addEventListener("error", () => { link.textContent = "not live: the daemon does not answer"; });
stream.addEventListener("parts", (event) => {
  for (const [name, html] of Object.entries(JSON.parse(event.data))) {
    document.getElementById(name).innerHTML = html;
  }
  document.body.dataset.updates = Number(document.body.dataset.updates || 0) + 1;
});
