"""What goes wrong, in the page's other languages: the sentence of a ChatError, by its English text.

A sentence that is not here is said in English, as is what a library underneath reported. The texts are those of the raise
itself: `pytest tests/chat/test_page_words.py` fails where one has changed and this has not.
"""

from collections.abc import Mapping
from typing import Any

from chat.engine import ChatError

DE = {
    # while answering
    "The conversation takes {needed:,} tokens and the context holds {size:,}: "
    "shorten it, start a new chat, or open the model with a larger --context.": "Das Gespräch braucht {needed:,} Tokens, und "
    "der Kontext fasst {size:,}: kürze es, beginne einen neuen Chat, oder öffne das Modell mit größerem --context.",
    "The answer stopped because of an error in the program: {error}": "Die Antwort brach wegen eines Fehlers im Programm "
    "ab: {error}",
    "An answer is still being written here: wait for it, or stop it first.": "Hier entsteht noch eine Antwort: warte auf "
    "sie, oder halte sie an.",
    "There is nothing to send: type a message first.": "Es gibt nichts zu senden: schreibe zuerst etwas.",
    "The message is longer than {most:,} characters: send it in parts.": "Die Nachricht ist länger als {most:,} Zeichen: "
    "sende sie in Teilen.",
    "There is nothing left of the message: delete it, or type something.": "Von der Nachricht ist nichts übrig: lösche sie, "
    "oder schreibe etwas.",
    "Only an answer of the model can be written again or continued.": "Nur eine Antwort des Modells kann neu geschrieben "
    "oder fortgesetzt werden.",
    "There is nothing to summarise yet: no question here has an answer.": "Es gibt noch nichts zusammenzufassen: keine Frage "
    "hier hat eine Antwort.",
    # the program and its conversations
    "The program is closing: start it again, nothing is lost.": "Das Programm wird beendet: starte es neu, nichts ist "
    "verloren.",
    "The program has ended: start it again.": "Das Programm ist beendet: starte es neu.",
    "The model is still being loaded: try again in a moment.": "Das Modell wird noch geladen: versuche es gleich wieder.",
    "This conversation does not exist any more: choose another from the list, or start a new one.": "Dieser Chat besteht "
    "nicht mehr: wähle einen anderen aus der Liste, oder beginne einen neuen.",
    "The message to go on from is not in this conversation: reload the page.": "Die Nachricht, nach der es weitergehen soll, "
    "ist nicht in diesem Chat: lade die Seite neu.",
    "This message is not in this conversation: reload the page.": "Diese Nachricht ist nicht in diesem Chat: lade die Seite "
    "neu.",
    "You are not signed in: reload the page.": "Du bist nicht angemeldet: lade die Seite neu.",
    "The page asked for something this program cannot do: reload it.": "Die Seite wollte etwas, was dieses Programm nicht "
    "kann: lade sie neu.",
    "A title needs at least one letter.": "Ein Titel braucht mindestens einen Buchstaben.",
    # settings and presets
    "The seed is {seed}; it must be a whole number from 0 to {most}, or empty.": "Der Startwert ist {seed}; er muss eine "
    "ganze Zahl von 0 bis {most} sein, oder leer.",
    "A preset needs a name.": "Eine Vorlage braucht einen Namen.",
    "{name} is one of the program's own presets: choose another name.": "{name} ist eine Vorlage des Programms: wähle einen "
    "anderen Namen.",
    "The program's own presets stay; only yours can be removed.": "Die Vorlagen des Programms bleiben; nur deine können "
    "entfernt werden.",
    # files
    "{name} has {size:.1f} MB; at most {most:.0f} MB can be attached: cut it.": "{name} hat {size:.1f} MB; höchstens "
    "{most:.0f} MB können angehängt werden: kürze die Datei.",
    "The files hold more than {most:,} characters together: send them in parts.": "Die Dateien haben zusammen mehr als "
    "{most:,} Zeichen: sende sie in Teilen.",
    "{name} is neither text in UTF-8 nor a PDF: only these can be attached.": "{name} ist weder Text in UTF-8 noch ein PDF: "
    "nur diese können angehängt werden.",
    "{name} is a binary file: only text, code and PDF can be attached.": "{name} ist eine Binärdatei: nur Text, Code und PDF "
    "können angehängt werden.",
    "PDF files need the package pypdf: pip install pypdf.": "PDF-Dateien brauchen das Paket pypdf: pip install pypdf.",
    "{name} is locked with a password: save it without one.": "{name} ist mit einem Kennwort verschlossen: sichere die Datei "
    "ohne.",
    "{name} has {pages} pages; at most {most} can be attached: cut it.": "{name} hat {pages} Seiten; höchstens {most} können "
    "angehängt werden: kürze die Datei.",
    "{name} cannot be read as a PDF ({error}): it may be damaged.": "{name} kann nicht als PDF gelesen werden ({error}): die "
    "Datei ist vielleicht beschädigt.",
    "{name} holds pictures of text, but no text: it would have to be recognised first.": "{name} enthält Bilder von Text, "
    "aber keinen Text: er müsste erst erkannt werden.",
    "This is more than {most} MB: send less at once.": "Das sind mehr als {most} MB: sende weniger auf einmal.",
    "This export was written by a newer version of this program: update the program.": "Diese Datei stammt von einer neueren "
    "Fassung des Programms: erneuere das Programm.",
    "This file holds no conversations that can be read ({error}): expected are an export of this program, OpenAI "
    "messages as JSON or JSONL, or a chat of text-generation-webui.": "Diese Datei enthält keine lesbaren Chats ({error}): "
    "erwartet wird eine Datei dieses Programms, OpenAI-Nachrichten als JSON oder JSONL, oder ein Chat von "
    "text-generation-webui.",
    # models and receipts
    "The app is offline (--offline or HF_HUB_OFFLINE): start it without that to download.": "Das Programm ist offline "
    "(--offline oder HF_HUB_OFFLINE): starte es ohne dies, um etwas zu holen.",
    "On a Space the model stays as it is.": "In einem Space bleibt das Modell, wie es ist.",
    "{name} is not on this disk any more: look at the list again.": "{name} ist nicht mehr auf diesem Rechner: sieh die Liste "
    "noch einmal an.",
    "This answer has no receipt: it was typed, edited or imported, not written by the model.": "Zu dieser Antwort gibt es "
    "keinen Nachweis: sie wurde getippt, bearbeitet oder hereingeholt, nicht vom Modell geschrieben.",
    "The answer was written with the {name} {then}, and now it is {now}: open that one.": "Die Antwort entstand mit {name} "
    "{then}, und jetzt ist es {now}: öffne jenes.",
    "What came before this answer is not as it was (settings, or turns left out): it cannot be repeated.": "Was vor dieser "
    "Antwort steht, ist nicht mehr, wie es war (Einstellungen, oder Weggelassenes): sie kann nicht wiederholt werden.",
}
LANGUAGES = {"de": DE}


def told(error: ChatError, language: str | None) -> str:
    """The sentence for a browser's language tag, as `de-AT`, or its Accept-Language."""
    return say(error.text, error.fields, language)


def say(text: str, fields: Mapping[str, Any], language: str | None) -> str:
    text = LANGUAGES.get((language or "")[:2].lower(), {}).get(text, text)
    return text.format(**fields) if fields else text
