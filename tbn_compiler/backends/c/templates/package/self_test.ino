// Runs the self-test of the model, and prints what it found: its stored inputs give what they gave in PyTorch, or not.
#include <{{ name }}.h>

void setup()
{
    Serial.begin(115200);
}

void loop()
{
    const unsigned long start = millis();
    const int failed = {{ name }}_self_test();
    const unsigned long elapsed = millis() - start;

    if (failed == 0) {
        Serial.print("{{ name }}: self-test passed, milliseconds: ");
    } else {
        Serial.print("{{ name }}: self-test failed at output ");
        Serial.print(failed);
        Serial.print(", milliseconds: ");
    }
    Serial.println(elapsed);
    delay(1000);
}
