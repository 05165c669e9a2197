// Sets the remembered theme before anything is drawn; without one the system's choice holds.
const remembered = localStorage.getItem("theme");
if (remembered) document.documentElement.dataset.theme = remembered;
