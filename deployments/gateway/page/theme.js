// The theme, chosen before the first paint: light, dark, or as the system has it.
document.documentElement.dataset.theme = localStorage.getItem("briolette.theme") ?? "auto";
